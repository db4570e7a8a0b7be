#!/bin/busybox sh
# What the script of each small guest begins with. The kernel passes `name=value` from its command line on as variables.
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
exec </dev/console >/dev/console 2>&1
stty -echo
while read -r module; do insmod "$module"; done </etc/firn/modules
# Only some monitors have a bus of this kind.
for device in /sys/bus/pci/devices/*; do
  [ -e "$device" ] || break
  for driver in virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci; do
    insmod /lib/modules/$driver.ko
  done
  break
done
load() { insmod "/lib/modules/$1.ko"; }
# work PROGRAM ARGUMENT...: runs a program of the host.
work() { /lib64/ld-linux-x86-64.so.2 --library-path /lib64 /bin/"$@"; }
over() {
  echo "${1:-over}"
  [ -z "$off" ] || poweroff -f
  reboot -f
}
fail() { over failed; }
# Does one thing, between two lines on the console. What is cold has been dropped from the guest's caches, but not from
# the host's.
cold() {
  echo 3 >/proc/sys/vm/drop_caches
  warm "$@"
}
warm() {
  echo "begin $1"
  "$2" >/dev/null
  echo "end $1"
}
