//! Guest kits: kernel, initrd and userland made from Debian packages.
