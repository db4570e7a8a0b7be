#!/bin/bash
# The root shell on hvc0: commands come in, what they print goes out, as bytes.

export USER=root HOME=/root DISPLAY=:0.0
[ ! -r /etc/profile ] || . /etc/profile
export PAGER=
cd /tmp || exit

exec </dev/hvc0 >/dev/hvc0 2>/dev/ttyS0
echo 'connecting to host...' >&2
stty -F /dev/hvc0 raw -echo
stty -F /dev/ttyS0 -echo
echo 'Spawning backdoor root shell...'
# Given the terminal as a script, bash takes itself for not interactive: no prompt, no job control.
exec bash --norc /dev/hvc0
