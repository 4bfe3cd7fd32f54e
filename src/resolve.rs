//! Host names of upstreams to addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::config::Family;
use crate::plan::{Desired, Name, Upstream};

/// The addresses of names, never none of them, or why there are none.
pub type Answers = BTreeMap<Name, Result<BTreeSet<IpAddr>, NoAnswer>>;

/// Why a name has no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoAnswer {
    /// Follows the name in a message.
    pub cause: String,
    /// The resolver may know later.
    pub temporary: bool,
}

/// The host names of a configuration.
pub fn names(desired: &Desired) -> BTreeSet<Name> {
    desired.upstreams().filter_map(Upstream::named).collect()
}

/// Asks the system's resolver.
pub async fn ask(names: BTreeSet<Name>) -> Answers {
    let mut answers = Answers::new();
    for name in names {
        let answer = lookup(&name).await;
        answers.insert(name, answer);
    }
    answers
}

async fn lookup((name, family): &Name) -> Result<BTreeSet<IpAddr>, NoAnswer> {
    let no = |cause| Err(NoAnswer { cause, temporary: false });
    match tokio::net::lookup_host((name.as_str(), 0)).await {
        Ok(found) => {
            let found = found.map(|address| address.ip());
            let found: BTreeSet<IpAddr> =
                found.filter(|address| Family::from(*address) == *family).collect();
            if found.is_empty() {
                no(format!("does not resolve: it has no {family} address"))
            } else {
                Ok(found)
            }
        }
        Err(error) => no(format!("does not resolve: {error}")),
    }
}
