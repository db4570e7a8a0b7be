work bench-guest memory "$mib" || fail
over
