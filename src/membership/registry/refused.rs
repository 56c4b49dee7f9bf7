//! Why the registry refuses: for each a code for programs and a sentence for people.

use ipnet::IpNet;

use crate::membership::authority::AuthorityError;
use crate::membership::etcd::members::MembersError;
use crate::membership::record::Role;
use crate::membership::store::StoreError;
use crate::membership::token::ID_LEN;

/// A refusal.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// No such token, or the wrong secret: the same answer for both.
    #[error("the token is not one of this cluster's; copy it again, or make one with `meshctl token create`")]
    BadToken,
    /// Too late.
    #[error("the token {0} has expired; make a new one with `meshctl token create` on a server")]
    TokenExpired(String),
    /// Too often.
    #[error("the token {0} is used up; make a new one with `meshctl token create` on a server")]
    TokenUsedUp(String),
    /// Withdrawn.
    #[error("the token {0} was revoked; make a new one with `meshctl token create` on a server")]
    TokenRevoked(String),
    /// For something else.
    #[error("the token {id} is for role {}, not {}; use one made with `--role {}`", .is.name(), .wanted.name(), .wanted.name())]
    WrongRole {
        /// The token.
        id: String,
        /// What it is for.
        is: Role,
        /// What the node wants to be.
        wanted: Role,
    },
    /// For somebody else.
    #[error("the token {id} is for node `{node}` alone; make another, or join under that name")]
    WrongNode {
        /// The token.
        id: String,
        /// Whom it is for.
        node: String,
    },
    /// The secret proof failed.
    #[error("the shared secret is wrong; use the `token:` of the first server")]
    WrongSecret,
    /// There is nothing to prove.
    #[error("this cluster has no shared secret; join with a token (`meshctl token create` on a server)")]
    NoSecret,
    /// The name has an owner.
    #[error(
        "the name `{0}` is that of another node; choose another (`node-name`, where meshd runs), or, if that node is gone for \
         good, run `meshctl node remove {0}` on a server first"
    )]
    NameTaken(String),
    /// The key has another name.
    #[error(
        "this node's key belongs to node `{0}`; join under that name, or remove its data-dir's `agent` folder to be a new node"
    )]
    KeyTaken(String),
    /// What the node says of itself cannot be.
    #[error("{0}")]
    BadRecord(String),
    /// No subnet is left.
    #[error(
        "no free subnet of /{mask} is left in {cidr} ({used} in use or resting: what a removed node had rests for {} days, in \
         case it comes back); the next one is free when a rest is over, or set up the cluster with a larger cluster-cidr",
        super::REST / 86_400
    )]
    Exhausted {
        /// Out of which.
        cidr: IpNet,
        /// Of which size.
        mask: u8,
        /// How many are not free.
        used: usize,
    },
    /// The clocks disagree by too much for certificates.
    #[error("this node's clock is {} off by the server's; set it (NTP), then start again", span(*.0))]
    ClockSkew(i64),
    /// It was a member.
    #[error("{0}")]
    Removed(String),
    /// It was a member, was away for too long, and may come back by its certificate.
    #[error("{0}")]
    Purged(String),
    /// It never was, as far as this store knows.
    #[error("this node is not a member of the cluster; join with a token")]
    NotMember,
    /// Nobody of that name.
    #[error("there is no node `{0}`; `meshctl nodes` lists them")]
    NoSuchNode(String),
    /// No such token.
    #[error("there is no token `{0}`; `meshctl token list` lists them")]
    NoSuchToken(String),
    /// Something else than a token's id.
    #[error("a token is revoked by its id, which is {digits} hexadecimal digits: `meshctl token list` shows it", digits = 2 * ID_LEN)]
    NoTokenId,
    /// Without it there is no cluster any more.
    #[error(
        "node `{0}` is the cluster's only server: without it no node could join, and nothing could be changed. Add another \
         server first, or restore a backup on the machine that takes its place; to end the cluster, run `meshctl leave` on \
         each node, on this one last"
    )]
    LastServer(String),
    /// The same, by its own will.
    #[error(
        "this node is the cluster's only server, and {} would have none: have them leave first, or add another server",
        nodes(*.others)
    )]
    LeavesNone {
        /// How many other nodes run meshd.
        others: usize,
    },
    /// Servers only.
    #[error("only servers may do this; run it on a server")]
    NotAllowed,
    /// It is not for the registry to answer.
    #[error("this is not done here")]
    NotHere,
    /// The source guessed too often.
    #[error("too many failed attempts from this address; try again in a minute")]
    TooMany,
    /// A further server cannot join such a cluster.
    #[error(
        "this cluster's state is in {0}, which further servers do not join by themselves: start its server with `cluster-init: \
         true`, or give all servers one `datastore-endpoint`"
    )]
    NoMembers(&'static str),
    /// A further server has to wait.
    #[error("{0}")]
    Later(String),
    /// Many wrote at once.
    #[error("too many changes at once; try again")]
    Busy,
    /// The store.
    #[error("the change is not stored: {0}")]
    Store(#[from] StoreError),
    /// This server's way to the store.
    #[error("this server does not reach the cluster's datastore now; another server may")]
    Away,
    /// Certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

impl Refused {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Refused::BadToken => "bad-token",
            Refused::TokenExpired(_) => "token-expired",
            Refused::TokenUsedUp(_) => "token-used-up",
            Refused::TokenRevoked(_) => "token-revoked",
            Refused::WrongRole { .. } => "wrong-role",
            Refused::WrongNode { .. } => "wrong-node",
            Refused::WrongSecret => "wrong-secret",
            Refused::NoSecret => "no-secret",
            Refused::NameTaken(_) => "name-taken",
            Refused::KeyTaken(_) => "key-taken",
            Refused::BadRecord(_) => "bad-record",
            Refused::Exhausted { .. } => "subnets-exhausted",
            Refused::ClockSkew(_) => "clock-skew",
            Refused::Removed(_) => "removed",
            Refused::Purged(_) => "purged",
            Refused::NotMember => "not-a-member",
            Refused::NoSuchNode(_) => "no-such-node",
            Refused::NoSuchToken(_) => "no-such-token",
            Refused::NoTokenId => "no-token-id",
            Refused::LastServer(_) | Refused::LeavesNone { .. } => "last-server",
            Refused::NotAllowed => "not-allowed",
            Refused::NotHere => "not-here",
            Refused::TooMany => "too-many-attempts",
            Refused::NoMembers(_) => "no-members",
            Refused::Later(_) => "later",
            Refused::Busy => "busy",
            Refused::Store(_) | Refused::Away => "store",
            Refused::Authority(AuthorityError::BadRequest) => "bad-request",
            Refused::Authority(_) => "authority",
        }
    }

    /// The HTTP status that says the same.
    pub fn status(&self) -> u16 {
        match self {
            Refused::BadRecord(_) | Refused::NoTokenId | Refused::NotHere => 400,
            Refused::Authority(AuthorityError::BadRequest) => 400,
            Refused::NoSuchNode(_) | Refused::NoSuchToken(_) => 404,
            Refused::NameTaken(_) | Refused::KeyTaken(_) => 409,
            Refused::TooMany => 429,
            Refused::Busy | Refused::Later(_) | Refused::Store(_) | Refused::Away => 503,
            Refused::Authority(_) => 500,
            Refused::Exhausted { .. } => 507,
            _ => 403,
        }
    }
}

impl From<MembersError> for Refused {
    fn from(error: MembersError) -> Self {
        match error {
            MembersError::Store(error) => Refused::Store(error),
            MembersError::Later(why) => Refused::Later(why),
        }
    }
}

fn nodes(count: usize) -> String {
    if count == 1 { "one other node".to_owned() } else { format!("{count} other nodes") }
}

fn span(seconds: i64) -> String {
    match seconds.unsigned_abs() {
        s if s >= 172_800 => format!("{} days", s / 86_400),
        s if s >= 7_200 => format!("{} hours", s / 3_600),
        s => format!("{s} seconds"),
    }
}
