# One of a pair of guests: the second of each serves, the first does what the host says.
# What a busy host delays is no sign of a full queue, nor of a peer that is far away: to one within half a millisecond
# Linux sends in segments as long as they can be (tcp_tso_rtt_log, 2 to its power of microseconds).
echo 0 >/sys/module/tcp_cubic/parameters/hystart
echo 20 >/proc/sys/net/ipv4/tcp_tso_rtt_log
ip link set lo up
ip link set eth0 up
ip addr add "10.9.0.$number/24" dev eth0
if [ -z "$peer" ]; then
  echo ready
  # `nc` has become `dd`, which ends with the stream.
  while nc -l -p 5000 -e dd of=/dev/null bs=262144 2>/dev/null; do echo received; done
  exit
fi
until ping -c 1 -W 1 "$peer" >/dev/null; do :; done
echo ready
while read -r what count; do
  case $what in
  stream) until nc "$peer" 5000 -e dd if=/dev/zero bs=262144 count="$count" 2>/dev/null; do usleep 10000; done ;;
  ping) ping -A -q -c "$count" "$peer" >/dev/null && echo answered ;;
  esac
done
