mkdir /s
if [ -e /etc/firn/image-drivers ]; then
  while read -r module; do insmod "$module"; done </etc/firn/image-drivers
  cat /sys/bus/virtio/devices/*/ndbus*/wait_probe
  mount -t erofs -o ro,dax=always /dev/pmem0 /s || fail
else
  mount -t virtiofs -o ro store /s || fail
fi
names() { find /s; }
attributes() { ls -lR /s; }
small() { find /s -type f -size -64k | xargs cat; }
large() { find /s -type f -size +1000k | xargs cat; }
begins() { find /s -type f | xargs head -q -c 1; }
archive() { tar cf - /s 2>/dev/null; }
program() {
  libraries=/s/usr/lib/x86_64-linux-gnu
  $libraries/ld-linux-x86-64.so.2 --library-path $libraries /s/usr/bin/python3 -BSsc 'import asyncio, json, ssl'
}
export PYTHONHOME=/s/usr
cold "find" names
cold "stat all" attributes
warm "stat again" attributes
cold "read small" small
cold "read large" large
warm "read again" large
cold "tar" archive
cold "python3" program
warm "python3 again" program
begins >/dev/null
warm "open, read, close" begins
over
