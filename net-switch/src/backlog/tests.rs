use super::*;

fn frame(length: usize, fill: u8) -> OwnedFrame {
    OwnedFrame { header: Header { flags: fill, ..Header::default() }, data: vec![fill; length] }
}

#[test]
fn keeps_order_and_headers_and_drops_at_the_tail() {
    let mut backlog = Backlog::new(2, 1000);
    assert_eq!(frame(60, 1).lend(|f| backlog.push(f)), Delivery::Taken);
    assert_eq!(backlog.push_owned(frame(70, 2)), Delivery::Taken);
    assert_eq!(frame(80, 3).lend(|f| backlog.push(f)), Delivery::Dropped);
    assert_eq!((backlog.len(), backlog.bytes(), backlog.dropped()), (2, 130, 1));
    assert_eq!(backlog.front(), Some(&frame(60, 1)));
    assert_eq!(backlog.pop(), Some(frame(60, 1)));
    assert_eq!(backlog.iter().collect::<Vec<_>>(), [&frame(70, 2)]);
    assert_eq!(backlog.pop(), Some(frame(70, 2)));
    assert_eq!(backlog.pop(), None);
    assert_eq!(backlog.bytes(), 0);
}

#[test]
fn is_bounded_by_bytes() {
    let mut backlog = Backlog::new(100, 100);
    assert_eq!(backlog.push_owned(frame(101, 1)), Delivery::Dropped);
    assert_eq!(backlog.push_owned(frame(60, 1)), Delivery::Taken);
    assert_eq!(backlog.push_owned(frame(41, 1)), Delivery::Dropped);
    assert_eq!(backlog.push_owned(frame(40, 1)), Delivery::Taken);
    assert_eq!((backlog.bytes(), backlog.dropped()), (100, 2));
    backlog.clear();
    assert!(backlog.is_empty());
    assert_eq!(backlog.push_owned(frame(100, 1)), Delivery::Taken);
    assert_eq!(backlog.dropped(), 2);
}

#[test]
fn a_frame_in_pieces_is_copied_whole() {
    let (mut a, mut b, mut c) = ([1_u8; 5], [0_u8; 0], [2_u8; 9]);
    let data = [&mut a[..], &mut b[..], &mut c[..]].map(VolatileSlice::from);
    let frame = Frame { header: Header::default(), data: &data };
    assert_eq!(frame.total_len(), 14);
    assert_eq!(OwnedFrame::from(&frame).data, [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]);
    let mut start = [0; 7];
    assert_eq!(frame.copy_to(&mut start), 7);
    assert_eq!(start, [1, 1, 1, 1, 1, 2, 2]);
    assert_eq!(frame.copy_to(&mut [0; 99]), 14);
}
