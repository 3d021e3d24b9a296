#!/bin/sh
# PID 1 of a machine whose root file system is on its first disk: loads the drivers and hands over.
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/lib/modules/$module.ko"; done </etc/modules
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  [ -b /dev/vda ] && break
  sleep 0.2
done
if ! mount -t ext4 /dev/vda /root; then
  echo "ROOT-NOT-MOUNTED: no ext4 file system on /dev/vda"
  poweroff -f
fi
mount --move /dev /root/dev
mount --move /sys /root/sys
mount --move /proc /root/proc
exec switch_root /root /sbin/init
