use super::*;

#[test]
fn debug_kit() {
    let Ok(path) = std::env::var("EROFS_DIR") else { return };
    let root = File::open(&path).unwrap();
    for _ in 0..3 {
        let start = std::time::Instant::now();
        let image = Image::compose(&root, path.as_ref(), "nix-store", &Filter::default()).unwrap();
        let took = start.elapsed();
        eprintln!("{took:?} {} {} files {:x}", image.len(), image.files.len(), image.digest());
        let start = std::time::Instant::now();
        eprintln!("{:?} {:?}", image.changed_file(), start.elapsed());
        if let Ok(path) = std::env::var("EROFS_IMAGE") {
            image.memory.write_to(&File::create(path).unwrap()).unwrap();
        }
    }
}
