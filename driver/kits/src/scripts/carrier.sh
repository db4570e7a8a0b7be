#!/bin/sh
# Run by the agent before it serves: makes /mnt a place where the host's programs run.

ip link set lo up

# KVM keeps the TSC frequency it finds when it is loaded. The kernel refines it within its first seconds; in guests that
# have an older one timers die.
clocks=/sys/devices/system/clocksource/clocksource0/available_clocksource
for _ in $(seq 100); do
  case " $(cat $clocks) " in *" tsc "*) break ;; esac
  sleep 0.1
done
for driver in irqbypass kvm ccp kvm_amd; do
  insmod "/lib/modules/$driver.ko"
done
chmod 666 /dev/kvm /dev/net/tun /dev/fuse 2>/dev/null

# Nobody in the carrier changes the host's root, so what was read once may be kept.
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 root /mnt || exit
for dir in dev proc sys; do
  mount -o rbind "/$dir" "/mnt/$dir"
done
# NixOS has its programs there.
system=$(readlink /mnt/run/current-system)
mount -t tmpfs -o mode=755 tmpfs /mnt/run
[ -z "$system" ] || ln -s "$system" /mnt/run/current-system

# Programs find what the host's /tmp holds; what they write there stays inside. 9p has no sockets, tmpfs has.
mkdir -p /run/tmp
mount -t tmpfs -o mode=755 tmpfs /run/tmp
mkdir -m 1777 /run/tmp/upper /run/tmp/work
mount -t overlay -o lowerdir=/mnt/tmp,upperdir=/run/tmp/upper,workdir=/run/tmp/work overlay /mnt/tmp ||
  mount -t tmpfs -o mode=1777 tmpfs /mnt/tmp
exit 0
