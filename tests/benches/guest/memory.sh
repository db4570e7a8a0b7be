work bench-guest memory "$mib" && over
