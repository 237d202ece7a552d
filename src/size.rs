//! Sizes as `qemu-img` takes and shows them: 200M, 1.5G, 128K, all with powers of 1024.
//!
//! Used by every subcommand that reads or shows a size, and by the driver's options.

use crate::error::{Error, ErrorKind, Result};

const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
const LETTERS: &str = "BKMGTPE";
/// Digits after the point that are looked at; more make no difference to anybody.
const FRACTION_DIGITS: usize = 9;
/// QEMU counts bytes in signed 64-bit numbers.
const LARGEST: u128 = i64::MAX as u128;

/// Reads a size in bytes.
pub fn parse(text: &str) -> Result<u64> {
    let invalid = |why: &str| Error::new(ErrorKind::Invalid, format!("'{text}' {why}"));
    let nonsense =
        || invalid("is not a size; give a number of bytes, or one with K, M, G or T, as 200M");
    let too_large = || invalid("is too large for a size; the largest is 2^63 - 1 bytes");
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at_checked(split).ok_or_else(nonsense)?;
    let unit = unit_bits(suffix).ok_or_else(nonsense)?;
    let (whole, fraction) = match number.split_once('.') {
        // Part of a byte makes no sense.
        Some((_, fraction)) if fraction.is_empty() || unit == 0 => return Err(nonsense()),
        Some(parts) => parts,
        None => (number, ""),
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !(fraction.is_empty() || digits(fraction)) {
        return Err(nonsense());
    }
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    let fraction = fraction.get(..FRACTION_DIGITS.min(fraction.len())).unwrap_or_default();
    let scale = 10u128.pow(fraction.len() as u32);
    let part = fraction.parse::<u128>().unwrap_or(0);
    let bytes = whole
        .checked_mul(1 << unit)
        .and_then(|bytes| bytes.checked_add((part << unit) / scale))
        .filter(|bytes| *bytes <= LARGEST)
        .ok_or_else(too_large)?;
    u64::try_from(bytes).map_err(|_| too_large())
}

/// log2 of the unit that a suffix stands for.
fn unit_bits(suffix: &str) -> Option<u32> {
    let mut chars = suffix.chars();
    match (chars.next(), chars.next()) {
        (None, _) => Some(0),
        (Some(letter), None) => {
            LETTERS.find(letter.to_ascii_uppercase()).map(|index| index as u32 * 10)
        }
        _ => None,
    }
}

/// A size for people: "4 GiB", "75.7 MiB".
pub fn human(bytes: u64) -> String {
    let exponent = (bytes.max(1).ilog2() / 10).min(UNITS.len() as u32 - 1);
    let unit = UNITS.get(exponent as usize).copied().unwrap_or_default();
    let (whole, rest) = (bytes >> (10 * exponent), bytes & ((1 << (10 * exponent)) - 1));
    match rest {
        0 => format!("{whole} {unit}"),
        _ => {
            let decimals = usize::from(whole < 100) + usize::from(whole < 10);
            let value = bytes as f64 / (1u64 << (10 * exponent)) as f64;
            format!("{value:.decimals$} {unit}")
        }
    }
}

/// A size for people with the exact number behind it.
pub fn human_exact(bytes: u64) -> String {
    match bytes {
        0..1024 => human(bytes),
        _ => format!("{} ({bytes} bytes)", human(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        let cases = [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("128K", 128 << 10),
            ("128k", 128 << 10),
            ("200M", 200 << 20),
            ("1G", 1 << 30),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("7E", 7 << 60),
            ("9223372036854775807", i64::MAX as u64),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn nonsense_is_not_a_size() {
        let cases = [
            "", "abc", "-1", "+1", "M", "1.5", "1.", ".5G", "1..5G", "1.5.5G", "1Q", "1MB", "1 M",
            "0x10", "1e3", "ä", "1ä", "²", " 1",
        ];
        for text in cases {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains("is not a size"), "{text}: {message}");
        }
    }

    #[test]
    fn a_size_above_two_to_the_63_is_too_large() {
        let cases = ["8E", "9223372036854775808", "18446744073709551616", "99999999999999999999G"];
        let longer = "9".repeat(60);
        for text in cases.iter().copied().chain([longer.as_str()]) {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains("too large"), "{text}: {message}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        let cases = [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.50 KiB"),
            (79_344_435, "75.7 MiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human(bytes), text);
        }
    }
}
