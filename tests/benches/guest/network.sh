# Takes what the host sends, then gives what it fetches. `dd` moves more at a time than busybox's `wget` and `httpd`:
# what is measured is the network, not these.
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
take() { nc 10.0.2.2 "$port" -e dd of=/dev/null bs=262144 2>/dev/null; }
take
nc -ll -p 80 -e dd if=/dev/zero bs=262144 count="$blocks" 2>/dev/null &
until grep -q ":0050 " /proc/net/tcp*; do usleep 10000; done
# It is ready, and gone when the host says so.
take
over
