# What the boot scripts of kits have in common. The driver's files below /etc/firn describe the machine.

# Loads the drivers of devices that few machines have; the numbers are those of virtio 1.2, 5.
load_drivers() {
  # Only QEMU's machines have a bus of this kind.
  for device in /sys/bus/pci/devices/*; do
    [ -e "$device" ] || break
    for driver in virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci; do
      [ -d "/sys/module/$driver" ] || [ ! -e "/lib/modules/$driver.ko" ] || insmod "/lib/modules/$driver.ko"
    done
    break
  done
  for file in /sys/bus/virtio/devices/*/device; do
    read -r device <"$file" || continue
    case $device in
    0x0002) drivers=virtio_blk ;;
    0x0005) drivers=virtio_balloon ;;
    # logind lets sessions have only devices that the kernel knew when it started.
    0x0010) drivers=drm ;;
    0x0012) drivers='virtio_input evdev' ;;
    0x0013) drivers="vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport" ;;
    0x001b)
      [ -d /sys/module/virtio_pmem ] || [ ! -e /etc/firn/image-drivers ] || while read -r driver; do
        insmod "$driver"
      done </etc/firn/image-drivers
      continue
      ;;
    *) continue ;;
    esac
    for driver in $drivers; do
      # What the initrd does not have, udev loads later.
      [ -d "/sys/module/$driver" ] || [ ! -e "/lib/modules/$driver.ko" ] || insmod "/lib/modules/$driver.ko"
    done
  done
}

# find_card MAC: sets $card to the name of the card with that hardware address.
find_card() {
  for dir in /sys/class/net/*; do
    read -r address <"$dir/address" || continue
    if [ "$address" = "$1" ]; then
      card=${dir##*/}
      return
    fi
  done
  return 1
}

# Gives the cards their names and addresses.
set_up_network() {
  # Addresses of a test network are unique; looking for duplicates would delay them by a second.
  echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
  echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad

  ip link set lo up

  # The driver lists the last card first: the kernel counts from eth0 and tests from eth1, so each new name is free
  # when its turn comes.
  while read -r name mac addresses; do
    if ! find_card "$mac"; then
      echo "firn: no network card has the address $mac of $name" >&2
      continue
    fi
    if [ "$card" != "$name" ]; then
      [ -e "/sys/class/net/$name" ] && ip link set "$name" name "was-$name"
      ip link set "$card" name "$name"
    fi
    echo 0 >"/proc/sys/net/ipv6/conf/$name/accept_dad"
    ip link set "$name" up
    for address in $addresses; do
      case $address in
      via=*) ip route add default via "${address#via=}" ;;
      *) ip addr add "$address" dev "$name" ;;
      esac
    done
  done </etc/firn/network
}

# find_image TAG: sets $image to the name of the memory in which that share is.
find_image() {
  # The kernel looks for what is in such memory beside all else; to read this is to wait for it.
  for bus in /sys/bus/virtio/devices/*/ndbus*; do
    read -r waited <"$bus/wait_probe"
  done
  for image in /dev/pmem*; do
    # The label: EROFS has its superblock at 1,024, and in that this at 64. The shell leaves out zeros.
    [ "$(dd if="$image" bs=16 skip=68 count=1 2>/dev/null)" = "$1" ] && return
  done
  echo "firn: there is no image with the label $1" >&2
  return 1
}

# mount_shares ROOT: mounts what the driver asks for below ROOT.
mount_shares() {
  # Without -r: a backslash keeps the blank behind it.
  while read tag dir type options; do
    dir=$1$dir
    [ -d "$dir" ] || mkdir -p "$dir"
    source=$tag
    if [ "$type" = erofs ]; then
      find_image "$tag" || continue
      source=$image
    fi
    mount -t "$type" -o "$options" "$source" "$dir"
  done </etc/firn/mounts
}
