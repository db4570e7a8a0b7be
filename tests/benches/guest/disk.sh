load virtio_blk
work bench-guest disk /dev/vda "$mib" || fail
over
