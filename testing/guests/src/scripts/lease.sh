#!/bin/sh
# What udhcpc calls when a lease comes ($1 = bound), is renewed or ends; the lease is in the environment.
case "$1" in
  deconfig) ifconfig "$interface" 0.0.0.0 up ;;
  bound | renew)
    ifconfig "$interface" "$ip" netmask "${subnet:-255.255.255.0}" broadcast "${broadcast:-+}" up
    # The interface may be slower than the network; never the other way round.
    [ -z "$mtu" ] || ifconfig "$interface" mtu "$mtu" 2>/dev/null
    while route del default dev "$interface" 2>/dev/null; do :; done
    for gateway in $router; do route add default gw "$gateway" dev "$interface" && break; done
    {
      [ -z "$domain" ] || echo "search $domain"
      for server in $dns; do echo "nameserver $server"; done
    } >/etc/resolv.conf
    ;;
esac
