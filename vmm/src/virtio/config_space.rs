//! Configuration spaces (virtio 1.2, 2.5): structures as the specification gives them, with fields
//! of [`Le16`](vm_memory::Le16) and the like.

use vm_memory::{ByteValued, Le16, Le32, Le64};

/// Copies from `space` at `offset`; bytes past its end read as zero.
pub fn read_config_space(space: &impl ByteValued, offset: u64, data: &mut [u8]) {
    data.fill(0);
    let space = ByteValued::as_slice(space);
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or(&[]);
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

/// What a configuration space may consist of.
///
/// # Safety
/// It has no gaps, and any bytes are a value of it.
pub unsafe trait Field {}

// SAFETY: a byte.
unsafe impl Field for u8 {}
// SAFETY: two bytes, whatever their order.
unsafe impl Field for Le16 {}
// SAFETY: four bytes, whatever their order.
unsafe impl Field for Le32 {}
// SAFETY: eight bytes, whatever their order.
unsafe impl Field for Le64 {}
// SAFETY: bytes.
unsafe impl<const N: usize> Field for [u8; N] {}

/// Declares a configuration space, or another structure of the guest's: its fields follow each other without gaps.
macro_rules! config_space {
    ($(#[$doc:meta])* $vis:vis struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        #[repr(C, packed)]
        $vis struct $name { $($(#[$field_doc])* $field: $kind,)* }

        // SAFETY: any bytes are a value of each field, or it would not be a `Field`, and it is packed: there are no
        // gaps between them.
        unsafe impl vm_memory::ByteValued for $name
        where
            $($kind: $crate::virtio::config_space::Field,)*
        {}
    };
}
pub(super) use config_space;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_past_the_end_are_zero() {
        for (offset, expected) in
            [(0, [1, 2, 3, 4]), (3, [4, 5, 0, 0]), (5, [0; 4]), (u64::MAX, [0; 4])]
        {
            let mut data = [0xff; 4];
            read_config_space(&[1_u8, 2, 3, 4, 5], offset, &mut data);
            assert_eq!(data, expected);
        }
    }
}
