#!/bin/sh
# PID 1 of the quick start: prepares the machine, then becomes busybox init, which understands
# `poweroff`, `reboot` and `halt`.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
hostname -F /etc/hostname
while read -r module; do insmod "/lib/modules/$module.ko"; done </etc/modules
ifconfig lo 127.0.0.1 up 2>/dev/null

# IPv6 addresses come by router advertisement, as soon as an interface is up. Whoever gets no IPv4 lease in two
# seconds goes on asking behind the shell's back.
for path in /sys/class/net/eth*; do
  [ -e "$path" ] || continue
  interface=${path##*/}
  ifconfig "$interface" up
  udhcpc -b -t 2 -T 1 -O mtu -x hostname:"$(hostname)" -i "$interface" >/dev/null 2>&1
done

# The shell belongs on the virtio console, whose window size follows the terminal's. Its port appears a
# moment after its driver.
tty=ttyS0
for try in 1 2 3 4 5 6 7 8 9 10; do
  if [ -c /dev/hvc0 ]; then tty=hvc0; break; fi
  ls -d /sys/bus/virtio/drivers/virtio_console/virtio* >/dev/null 2>&1 || break
  sleep 0.2
done
cat >/etc/inittab <<INITTAB
$tty::once:/etc/session
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/sync
INITTAB
dmesg -n 4
exec /sbin/init
