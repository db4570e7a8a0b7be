#!/nix/store/firn/busybox/sh
# From the store to a system that systemd can start in: what a boot may change is copied, the rest is bound.

export PATH=/nix/store/firn/busybox
cd /
cpio --quiet -idmu </nix/store/firn/root.cpio
mount -o bind /nix/store/debian/usr /usr
for dir in bin lib lib64 sbin; do
  ln -s "usr/$dir" "$dir"
done
# Opening one of these loads its driver.
mkdir /dev/net
mknod -m 666 /dev/net/tun c 10 200
mknod -m 600 /dev/loop-control c 10 237

ln -s /nix/store/toplevel /run/booted-system
ln -s /nix/store/toplevel /run/current-system

cp /run/firn/hostname /run/firn/hosts /etc/
read -r name </etc/hostname && echo "$name" >/proc/sys/kernel/hostname
# Without one systemd takes this for the first boot of an installation.
read -r id </proc/sys/kernel/random/uuid
while case $id in *-*) ;; *) false ;; esac; do
  id=${id%%-*}${id#*-}
done
echo "$id" >/etc/machine-id

if [ -d /sys/class/net/eth0 ]; then
  echo 'nameserver 10.0.2.3' >/etc/resolv.conf
  wants=/etc/systemd/system
  mkdir -p "$wants/multi-user.target.wants" "$wants/network-online.target.wants"
  ln -s /usr/lib/systemd/system/systemd-networkd.service "$wants/multi-user.target.wants/"
  ln -s /usr/lib/systemd/system/systemd-networkd-wait-online.service "$wants/network-online.target.wants/"
fi

# Without a vsock it would load a driver, and say that it has failed.
if ! [ -e /dev/vsock ]; then
  mkdir -p /etc/systemd/system-generators
  ln -s /dev/null /etc/systemd/system-generators/systemd-ssh-generator
fi

exec /usr/lib/systemd/systemd
