//! The carrier: an emulated outer machine with a KVM that works.
