//! The time, as an argument: what decides takes it and asks no clock.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A moment on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Seconds since 1970: for what people are told, and what must hold across restarts. It may jump.
    pub unix: i64,
    /// Since some start: for how long something took. It does not jump.
    pub mono: Duration,
}

impl Now {
    /// What the clocks say. The only place in `membership` that asks them for more than a pause.
    pub fn read() -> Self {
        static START: OnceLock<Instant> = OnceLock::new();
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Now { unix: i64::try_from(unix).unwrap_or(i64::MAX), mono: START.get_or_init(Instant::now).elapsed() }
    }

    /// The same moment as a date.
    pub fn date(self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(self.unix).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    }

    /// The same moment as HTTP writes it (RFC 9110 §5.6.7), to the end of the year 9999.
    pub fn http_date(self) -> String {
        const END: u64 = 253_402_300_799;
        let seconds = u64::try_from(self.unix).unwrap_or(0).min(END);
        httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(seconds))
    }
}

/// Seconds since 1970 as RFC 3339, in UTC.
pub fn rfc3339(unix: i64) -> String {
    let date = OffsetDateTime::from_unix_timestamp(unix).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    date.format(&Rfc3339).unwrap_or_else(|_| "1970-01-01T00:00:00Z".to_owned())
}

/// RFC 3339 as seconds since 1970.
pub fn from_rfc3339(text: &str) -> Option<i64> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(OffsetDateTime::unix_timestamp)
}
