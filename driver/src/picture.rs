//! Pictures of screens: as files, and prepared for OCR.

use std::io::{self, BufReader, Cursor};
use std::path::Path;

use firn_vmm::screen::Picture;
use firn_vmm::spec::Pixels;

/// Larger picture files are rejected.
const MAX_FILE: u64 = 256 << 20;
/// Pictures are enlarged up to this many pixels; more cost time and improve nothing.
const ENLARGED: usize = 8 << 20;
/// The factor by which small letters are read best.
const MAX_FACTOR: usize = 3;
/// Per mille of pixels that may be darker than what counts as black, and brighter than what counts as white.
const OUTLIERS: usize = 5;
/// In a prepared picture, shades below the first become black and those above the second white, so that text stands out
/// on a background of any other shade.
const INK: [u8; 2] = [70, 130];

/// The picture of a blank screen.
#[must_use]
pub fn black() -> Picture {
    let [width, height] = [Pixels::WIDTH, Pixels::HEIGHT].map(|side| u32::from(side.get()));
    Picture { width, height, rgb: vec![0; width as usize * height as usize * 3] }
}

/// Encodes a picture as PNG.
///
/// # Errors
/// If the picture has no pixels.
pub fn png(picture: &Picture) -> io::Result<Vec<u8>> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, picture.width, picture.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgb)?;
    writer.finish()?;
    Ok(file)
}

/// Encodes a picture as PPM.
#[must_use]
pub fn ppm(picture: &Picture) -> Vec<u8> {
    let mut file = format!("P6\n{} {}\n255\n", picture.width, picture.height).into_bytes();
    file.extend_from_slice(&picture.rgb);
    file
}

/// Reads a picture file: PNG, or PPM as written by [`ppm`].
///
/// # Errors
/// If it cannot be read or is neither.
pub fn read(path: &Path) -> io::Result<Picture> {
    let file = std::fs::File::open(path)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(BufReader::new(file), MAX_FILE), &mut bytes)?;
    let picture = if bytes.starts_with(b"P6") { of_ppm(&bytes) } else { of_png(&bytes) };
    picture
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is not a PNG or PPM picture"))
}

fn of_ppm(bytes: &[u8]) -> Option<Picture> {
    let mut numbers = [0; 3];
    let mut rest = bytes.strip_prefix(b"P6")?;
    for number in &mut numbers {
        let start = rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
        let end = start + rest[start..].iter().position(u8::is_ascii_whitespace)?;
        *number = std::str::from_utf8(&rest[start..end]).ok()?.parse().ok()?;
        rest = &rest[end..];
    }
    let ([width, height, 255], Some(rgb)) = (numbers, rest.get(1..)) else { return None };
    let size = u64::from(width) * u64::from(height) * 3;
    (size > 0 && rgb.len() as u64 == size).then(|| Picture { width, height, rgb: rgb.to_vec() })
}

fn of_png(bytes: &[u8]) -> Option<Picture> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().ok()?;
    let mut pixels = vec![0; reader.output_buffer_size().filter(|size| *size as u64 <= MAX_FILE)?];
    let info = reader.next_frame(&mut pixels).ok()?;
    let rgb = match info.color_type {
        png::ColorType::Rgb => pixels,
        png::ColorType::Rgba => {
            pixels.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect()
        }
        png::ColorType::Grayscale => pixels.iter().flat_map(|grey| [*grey; 3]).collect(),
        png::ColorType::GrayscaleAlpha => {
            pixels.chunks_exact(2).flat_map(|pixel| [pixel[0]; 3]).collect()
        }
        png::ColorType::Indexed => return None,
    };
    Some(Picture { width: info.width, height: info.height, rgb })
}

/// A picture in shades of grey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grey {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Grey {
    pub(crate) fn of(picture: &Picture) -> Self {
        // Weights of the colours for the eye (ITU-R BT.601), in 1/256.
        let luma = |[r, g, b]: &[u8; 3]| {
            let sum = u32::from(*r) * 77 + u32::from(*g) * 150 + u32::from(*b) * 29;
            shade(sum >> 8)
        };
        Self {
            width: picture.width as usize,
            height: picture.height as usize,
            pixels: picture.rgb.as_chunks().0.iter().map(luma).collect(),
        }
    }

    /// Enlarged for reading, with the full range from black to white.
    pub(crate) fn for_reading(&self) -> Self {
        let room = ENLARGED / self.pixels.len().max(1);
        let factor = (1..=MAX_FACTOR).rev().find(|factor| factor * factor <= room).unwrap_or(1);
        let mut large = self.enlarged(factor);
        large.stretch();
        large
    }

    /// Enlarges the picture by a factor, bilinearly.
    fn enlarged(&self, factor: usize) -> Self {
        let (width, height) = (self.width * factor, self.height * factor);
        let across: Vec<_> = (0..width).map(|at| between(at, factor, self.width)).collect();
        let mut pixels = Vec::with_capacity(width * height);
        for y in 0..height {
            let (top, bottom, down) = between(y, factor, self.height);
            let row = |y: usize| &self.pixels[y * self.width..][..self.width];
            let (top, bottom) = (row(top), row(bottom));
            pixels.extend(across.iter().map(|&(left, right, along)| {
                let mix =
                    |a: u8, b: u8, part: u32| u32::from(a) * (256 - part) + u32::from(b) * part;
                let (above, below) =
                    (mix(top[left], top[right], along), mix(bottom[left], bottom[right], along));
                shade((above * (256 - down) + below * down) >> 16)
            }));
        }
        Self { width, height, pixels }
    }

    /// Stretches the shades to the full range, except for a few outliers. A picture of one shade stays as it is.
    fn stretch(&mut self) {
        let mut counts = [0_usize; 256];
        self.pixels.iter().for_each(|shade| counts[usize::from(*shade)] += 1);
        let few = self.pixels.len() * OUTLIERS / 1000;
        let is_bound = |beyond: &mut usize, shade: u8| {
            *beyond += counts[usize::from(shade)];
            *beyond > few
        };
        let mut beyond = [0; 2];
        let dark = (0..=255).find(|shade| is_bound(&mut beyond[0], *shade));
        let bright = (0..=255).rev().find(|shade| is_bound(&mut beyond[1], *shade));
        if let (Some(dark), Some(bright)) = (dark, bright)
            && dark < bright
        {
            self.ramp(dark, bright);
        }
    }

    /// Turns shades up to `dark` black, those from `bright` white, and those between grey.
    fn ramp(&mut self, dark: u8, bright: u8) {
        let span = u32::from(bright - dark);
        for pixel in &mut self.pixels {
            let above = u32::from(pixel.saturating_sub(dark)).min(span);
            *pixel = shade(above * 255 / span);
        }
    }

    /// Dark letters on white, made from the dark letters, or with `bright` from the bright ones.
    pub(crate) fn letters(&self, bright: bool) -> Self {
        let mut letters = self.clone();
        if bright {
            letters.pixels.iter_mut().for_each(|shade| *shade = 255 - *shade);
        }
        letters.ramp(INK[0], INK[1]);
        letters
    }

    /// Encodes it as PGM.
    pub(crate) fn pgm(&self) -> Vec<u8> {
        let mut file = format!("P5\n{} {}\n255\n", self.width, self.height).into_bytes();
        file.extend_from_slice(&self.pixels);
        file
    }
}

/// A shade of grey, which is less than 256.
fn shade(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// The pixels on both sides of a position in an enlarged picture, and the weight of the second, in 1/256.
fn between(at: usize, factor: usize, count: usize) -> (usize, usize, u32) {
    // A pixel's shade is that of its centre.
    let place = (2 * at + 1).saturating_sub(factor);
    let (first, part) = (place / (2 * factor), place % (2 * factor));
    let first = first.min(count - 1);
    (
        first,
        (first + 1).min(count - 1),
        u32::try_from(part * 256 / (2 * factor)).unwrap_or_default(),
    )
}

/// A text console's text, if the picture shows it: cells with characters have more than one colour, others one.
/// A desktop may have replaced the console on the screen without notice.
pub(crate) fn shows(picture: &Picture, columns: usize, text: &[u8]) -> bool {
    let rows = text.len().checked_div(columns).unwrap_or(0);
    let (width, height) = (picture.width as usize, picture.height as usize);
    let (Some(across @ 1..), Some(down @ 1..)) =
        (width.checked_div(columns), height.checked_div(rows))
    else {
        return false;
    };
    let pixels: &[[u8; 3]] = picture.rgb.as_chunks().0;
    let drawn = |cell: usize| {
        let corner = cell / columns * down * width + cell % columns * across;
        let first = pixels[corner];
        (0..down)
            .any(|y| pixels[corner + y * width..][..across].iter().any(|pixel| *pixel != first))
    };
    let mut counts = [[0_usize; 2]; 2];
    for (cell, character) in text.iter().enumerate().take(rows * columns) {
        match character {
            // Characters other than ASCII may look like anything.
            b'!'..=b'>' | b'@'..=b'~' => counts[1][usize::from(drawn(cell))] += 1,
            b' ' => counts[0][usize::from(drawn(cell))] += 1,
            _ => {}
        }
    }
    let [[_, strange], [missing, seen]] = counts;
    // The cursor, the mouse pointer, the kernel's logo.
    missing * 10 <= seen && strange * 20 <= columns * rows
}

#[cfg(test)]
mod tests;
