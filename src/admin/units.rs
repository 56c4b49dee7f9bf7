//! Numbers as people read and write them.
//!
//! Owns human units in both directions. Knows nothing of what the numbers mean.

use std::time::Duration;

/// `1.2 GiB`.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, 1024.0, " ", &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// `12,345`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1.2 Gbit/s`.
pub fn bit_rate(bits_a_second: f64) -> String {
    scaled(bits_a_second, 1000.0, " ", &["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"])
}

/// `12.3k/s`.
pub fn packet_rate(packets_a_second: f64) -> String {
    scaled(packets_a_second, 1000.0, "", &["/s", "k/s", "M/s", "G/s"])
}

/// `12.3k`, where the column says what of.
pub fn short(n: f64) -> String {
    scaled(n, 1000.0, "", &["", "k", "M", "G", "T"])
}

/// `1.6 %`, of a thousandth.
pub fn permille(n: u32) -> String {
    format!("{}.{} %", n / 10, n % 10)
}

/// `850ms`, `42s`, `3h 12m`, `5d 1h`: two units at most.
pub fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if ms < 1000 => format!("{ms}ms"),
        () if minutes == 0 => format!("{seconds}s"),
        () if hours == 0 => format!("{minutes}m {}s", seconds % 60),
        () if days == 0 => format!("{hours}h {}m", minutes % 60),
        () => format!("{days}d {}h", hours % 24),
    }
}

/// `180 µs`, `1.2 ms`.
pub fn round_trip(us: u64) -> String {
    scaled(us as f64, 1000.0, " ", &["µs", "ms", "s"])
}

/// Growth a second; `None` when the counter went back (a restart) or no time passed.
pub fn rate(before: u64, after: u64, passed: Duration) -> Option<f64> {
    let grown = after.checked_sub(before)?;
    (!passed.is_zero()).then(|| grown as f64 / passed.as_secs_f64())
}

/// Reads `500ms`, `30s`, `2m`, `1h`, `7d`.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    let help = || format!("`{text}` is no duration: write a number and a unit, such as 500ms, 30s, 2m, 1h or 7d");
    let text = text.trim();
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(help)?;
    let (number, unit) = text.split_at(unit_at);
    let number: u64 = number.parse().map_err(|_| help())?;
    let ms_each = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(help()),
    };
    // A year is for ever, and small enough to be added to any clock.
    let ms = number.checked_mul(ms_each).filter(|ms| *ms <= 366 * 86_400_000);
    ms.map(Duration::from_millis).ok_or_else(|| format!("`{text}` is more than a year"))
}

/// One decimal, except for the smallest unit and for what would round to the next one.
fn scaled(mut n: f64, step: f64, gap: &str, units: &[&str]) -> String {
    let mut units = units.iter().peekable();
    let mut unit = units.next().copied().unwrap_or_default();
    let mut decimals = 0;
    while n >= step - if decimals == 0 { 0.5 } else { 0.05 } {
        let Some(next) = units.next() else { break };
        n /= step;
        unit = next;
        decimals = 1;
    }
    format!("{n:.decimals$}{gap}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_human_units() {
        let table =
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_288_490_189, "1.2 GiB"), (u64::MAX, "16.0 EiB")];
        for (n, text) in table {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(bytes(1024 * 1024 - 1), "1.0 MiB");
        for (n, text) in [(0.0, "0"), (999.0, "999"), (12_345.0, "12.3k"), (1.5e9, "1.5G")] {
            assert_eq!(short(n), text);
        }
        assert_eq!([permille(0), permille(16), permille(1000)], ["0.0 %", "1.6 %", "100.0 %"]);
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (12_345_678, "12,345,678")] {
            assert_eq!(count(n), text);
        }
        assert_eq!(bit_rate(0.0), "0 bit/s");
        assert_eq!(bit_rate(1.24e9), "1.2 Gbit/s");
        assert_eq!(bit_rate(999.96), "1.0 kbit/s");
        assert_eq!(packet_rate(12_340.0), "12.3k/s");
        assert_eq!(round_trip(180), "180 µs");
        assert_eq!(round_trip(1_234), "1.2 ms");
    }

    #[test]
    fn spans_have_two_units_at_most() {
        let table = [
            (0, "0ms"),
            (999, "999ms"),
            (3_400, "3s"),
            (61_000, "1m 1s"),
            (11_520_000, "3h 12m"),
            (435_600_000, "5d 1h"),
        ];
        for (ms, text) in table {
            assert_eq!(span(ms), text);
        }
    }

    #[test]
    fn a_rate_needs_time_and_growth() {
        assert_eq!(rate(100, 300, Duration::from_secs(2)), Some(100.0));
        assert_eq!(rate(300, 100, Duration::from_secs(2)), None);
        assert_eq!(rate(100, 300, Duration::ZERO), None);
    }

    #[test]
    fn durations_are_read_with_their_unit() {
        for (text, ms) in [("500ms", 500), ("30s", 30_000), ("2m", 120_000), ("1h", 3_600_000), ("0s", 0)] {
            assert_eq!(parse_span(text), Ok(Duration::from_millis(ms)));
        }
        for bad in ["", "30", "s", "1.5s", "-1s", "30 s", "30sec", "99999999999999999999s", "9999999h", "٣s"] {
            assert!(parse_span(bad).is_err(), "{bad}");
        }
    }
}
