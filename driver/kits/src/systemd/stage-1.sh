#!/bin/sh
# Process 1 until the machine's real root is there. Each process costs a millisecond of boot, so what the shell can do
# itself, it does. Whatever fails shows on the console; without a next init the kernel panics, which ends the machine.

. /etc/firn/lib.sh

mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o nosuid,mode=755 devtmpfs /dev
# Stage 16 of firn's boot timer, at port 0x608: the first program runs.
printf '\020' | dd of=/dev/port bs=1 seek=1544 conv=notrunc 2>/dev/null

while read -r module; do
  insmod "$module"
done </etc/firn/modules
load_drivers

root=/root
mount -t tmpfs -o mode=755 tmpfs "$root"
mkdir -p "$root/nix/.ro-store" "$root/nix/.rw-store" "$root/nix/store" "$root/dev" "$root/proc" "$root/run" "$root/sys"
mount -t virtiofs -o ro nix-store "$root/nix/.ro-store" || exit
mount -t tmpfs -o mode=755 tmpfs "$root/nix/.rw-store"
mkdir "$root/nix/.rw-store/upper" "$root/nix/.rw-store/work"
mount -t overlay -o "lowerdir=$root/nix/.ro-store,upperdir=$root/nix/.rw-store/upper,workdir=$root/nix/.rw-store/work" \
  overlay "$root/nix/store" || exit

set_up_network
mount_shares "$root"

mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs "$root/run"
mkdir "$root/run/firn"
cp /etc/hostname /etc/hosts "$root/run/firn/"

read -r arguments </proc/cmdline
for argument in $arguments; do
  case $argument in
  init=*) init=${argument#init=} ;;
  esac
done
for dir in dev proc sys; do
  mount -o move "/$dir" "$root/$dir"
done
exec switch_root "$root" "$init"
