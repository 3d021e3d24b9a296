#!/bin/sh
# The quick start's one session. busybox init made the terminal ours, so the shell has job control.
export HOME=/root TERM="${TERM:-xterm-256color}"
[ "$TERM" = linux ] && TERM=xterm-256color
cd /root || exit
printf '\n%s\n\n' "Atoll quick start: $(uname -sr) on $(nproc) CPU(s), $(($(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo) / 1024)) MiB."
printf '  %-22s %s\n' 'poweroff  (or exit)' 'ends the machine' 'reboot' 'starts it again' 'Ctrl-A x' 'leaves at once, without asking the guest'
disks=$(ls -d /sys/block/vd* 2>/dev/null | sed 's,.*/,/dev/,' | tr '\n' ' ')
[ -z "$disks" ] || printf '  %-22s %s\n' 'disks' "$disks"
addresses=$(ip -4 -o addr show scope global 2>/dev/null | awk '{ sub("/.*", "", $4); print $2, $4 }' | tr '\n' ' ')
[ -z "$addresses" ] || printf '  %-22s %s\n' 'network' "$addresses"
echo
sh -l
sync
poweroff -f
