//! This server among others over a shared store: whom it hears, and whether it is the one that judges.
//!
//! Heartbeats stay in the memory of the server that they come to. What the others have to know, *whom* it hears, is one
//! key, written when that changes, and bound to a lease that ends with the server: so a large cluster at rest writes
//! nothing. Readiness and purging are decided by one server alone, which holds the duty for as long as its lease lasts.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Registry;
use super::rows;
use crate::membership::clock::Now;
use crate::membership::store::{Compare, LeaseId, Op, Outcome, StoreError, Txn};

/// A server that is gone is noticed after so long.
const LEASE: Duration = Duration::from_secs(10);
const KEEP: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_millis(500);
/// Changes of whom it hears are gathered for so long.
const GATHER: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Presence {
    lease: Option<LeaseId>,
    kept: Duration,
    told: Option<(Duration, Vec<String>)>,
    duty: bool,
}

impl Registry {
    /// Takes part. Runs for ever; does nothing where there are no others.
    pub async fn attend(&self) {
        if !self.store.shared() {
            return std::future::pending().await;
        }
        let mut presence = Presence::default();
        loop {
            if let Err(error) = self.attended(&mut presence).await {
                tracing::debug!("{error}");
                if error == StoreError::NoLease {
                    presence = Presence::default();
                }
            }
            tokio::time::sleep(STEP).await;
        }
    }

    async fn attended(&self, presence: &mut Presence) -> Result<(), StoreError> {
        let now = Now::read().mono;
        let lease = match presence.lease {
            Some(lease) if now.saturating_sub(presence.kept) < KEEP => lease,
            Some(lease) => {
                self.store.keep_alive(lease).await?;
                presence.kept = now;
                lease
            }
            None => {
                let lease = self.store.grant(LEASE).await?;
                *presence = Presence { lease: Some(lease), kept: now, ..Presence::default() };
                lease
            }
        };
        let heard = self.health().heard_here(now);
        let due = presence.told.as_ref().is_none_or(|(at, told)| now.saturating_sub(*at) >= GATHER && *told != heard);
        if due {
            let put = Op::Put {
                key: format!("{}{}", rows::HEARD, self.instance),
                value: rows::json(&heard),
                lease: Some(lease),
            };
            self.store.txn(Txn { compares: vec![], ops: vec![put] }).await?;
            presence.told = Some((now, heard));
        }
        if !presence.duty && self.duty_free.load(Ordering::Relaxed) {
            let compares = vec![Compare { key: rows::DUTY.to_owned(), modified: 0 }];
            let value = self.instance.clone().into_bytes();
            let ops = vec![Op::Put { key: rows::DUTY.to_owned(), value, lease: Some(lease) }];
            presence.duty = matches!(self.store.txn(Txn { compares, ops }).await?, Outcome::Done(_));
            self.duty_free.store(false, Ordering::Relaxed);
        }
        // On the clock of this server, and counted from before it asked: it ends here before it ends in the store.
        let until = if presence.duty { presence.kept + LEASE } else { Duration::ZERO };
        self.duty_until.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(())
    }

    /// Whether this server is the one that judges.
    pub fn on_duty(&self, now: Now) -> bool {
        !self.store.shared() || now.mono < Duration::from_millis(self.duty_until.load(Ordering::Relaxed))
    }
}
