//! Reading a device's configuration space (virtio 1.2, 2.5).

/// Copies from `space` at `offset`; bytes past its end read as zero.
pub fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or(&[]);
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_past_the_end_are_zero() {
        for (offset, expected) in
            [(0, [1, 2, 3, 4]), (3, [4, 5, 0, 0]), (5, [0; 4]), (u64::MAX, [0; 4])]
        {
            let mut data = [0xff; 4];
            read_config_space(&[1, 2, 3, 4, 5], offset, &mut data);
            assert_eq!(data, expected);
        }
    }
}
