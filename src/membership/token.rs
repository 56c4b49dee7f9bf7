//! Join tokens: what a person pastes on a new node.
//!
//! A token is `mesh1` and, in base64url without padding, these bytes: format version (1), SHA-256 of the cluster CA's
//! certificate (32), token id (6), secret (20), number of servers (1), each server's address with its length before it, and
//! the first four bytes of SHA-256 over everything before. Owns this form and knows nothing of who made a token or whether it
//! is still good.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use super::address::ServerAddress;
use super::settings::Secret;

/// What every token starts with, and no shared secret may.
pub const PREFIX: &str = "mesh1";
/// Bytes of a token's secret: 160 bits, out of reach for guessing.
pub const SECRET_LEN: usize = 20;
/// Bytes of a token's id.
pub const ID_LEN: usize = 6;

const VERSION: u8 = 1;
const CHECKSUM_LEN: usize = 4;
const MAX_SERVERS: usize = 16;

/// A join token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Registration addresses: at least one.
    pub servers: Vec<ServerAddress>,
    /// SHA-256 of the cluster CA's certificate (DER).
    pub ca_hash: [u8; 32],
    /// Which token it is; no secret.
    pub id: TokenId,
    /// What proves that it was minted.
    pub secret: TokenSecret,
}

/// A token's id: twelve hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub [u8; ID_LEN]);

/// A token's secret.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenSecret(pub [u8; SECRET_LEN]);

/// What a node joins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// A whole token.
    Token(Token),
    /// A secret that people agreed on before there was a cluster.
    Shared(Secret),
}

/// Why a text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// There is nothing.
    #[error("the token is empty")]
    Empty,
    /// It has blanks or line breaks within.
    #[error("the token has a blank or line break in it; copy it again, in one piece")]
    Blank,
    /// It starts as a token, and then is none.
    #[error("the token is damaged: it starts with `{PREFIX}`, but characters are missing or changed; copy it again")]
    Damaged,
    /// From another release.
    #[error("the token has format {0}, which this version does not know; use the same version as the server")]
    Version(u8),
}

impl Credential {
    /// Takes what the user gave: a text that starts as a token is one or an error, and any other text is a shared secret.
    pub fn parse(text: &str) -> Result<Self, BadToken> {
        let text = text.trim();
        if text.is_empty() {
            return Err(BadToken::Empty);
        }
        if text.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX)) {
            return text.parse().map(Credential::Token);
        }
        Ok(Credential::Shared(Secret::new(text)))
    }
}

impl Token {
    /// The token as text; the only way to get at its secret in print.
    pub fn reveal(&self) -> Secret {
        let mut bytes = Zeroizing::new(vec![VERSION]);
        bytes.extend_from_slice(&self.ca_hash);
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(&self.secret.0);
        let servers: Vec<String> =
            self.servers.iter().take(MAX_SERVERS).map(short).filter(|s| s.len() <= 255).collect();
        bytes.push(servers.len() as u8);
        for server in servers {
            bytes.push(server.len() as u8);
            bytes.extend_from_slice(server.as_bytes());
        }
        let sum = Sha256::digest(&*bytes);
        bytes.extend_from_slice(&sum[..CHECKSUM_LEN]);
        Secret::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&*bytes)))
    }
}

impl FromStr for Token {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let text = text.trim();
        if text.contains(char::is_whitespace) {
            return Err(BadToken::Blank);
        }
        let encoded = text.strip_prefix(PREFIX).ok_or(BadToken::Damaged)?;
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(encoded).map_err(|_| BadToken::Damaged)?);
        let (body, sum) = bytes.split_last_chunk::<CHECKSUM_LEN>().ok_or(BadToken::Damaged)?;
        if Sha256::digest(body)[..CHECKSUM_LEN] != sum[..] {
            return Err(BadToken::Damaged);
        }
        let (version, body) = body.split_first().ok_or(BadToken::Damaged)?;
        if *version != VERSION {
            return Err(BadToken::Version(*version));
        }
        let (ca_hash, body) = body.split_first_chunk().ok_or(BadToken::Damaged)?;
        let (id, body) = body.split_first_chunk().ok_or(BadToken::Damaged)?;
        let (secret, body) = body.split_first_chunk().ok_or(BadToken::Damaged)?;
        let (count, mut body) = body.split_first().ok_or(BadToken::Damaged)?;
        let mut servers = Vec::new();
        for _ in 0..*count {
            let (len, rest) = body.split_first().ok_or(BadToken::Damaged)?;
            let (server, rest) = rest.split_at_checked(usize::from(*len)).ok_or(BadToken::Damaged)?;
            let server = std::str::from_utf8(server).map_err(|_| BadToken::Damaged)?;
            servers.push(server.parse().map_err(|_| BadToken::Damaged)?);
            body = rest;
        }
        if servers.is_empty() || !body.is_empty() {
            return Err(BadToken::Damaged);
        }
        Ok(Token { servers, ca_hash: *ca_hash, id: TokenId(*id), secret: TokenSecret(*secret) })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("id", &self.id.to_string())
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for TokenId {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let mut id = [0; ID_LEN];
        if text.len() != 2 * ID_LEN || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BadToken::Damaged);
        }
        for (byte, digits) in id.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| BadToken::Damaged)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| BadToken::Damaged)?;
        }
        Ok(TokenId(id))
    }
}

impl TokenSecret {
    /// What servers keep of it.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.0).into()
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl Drop for TokenSecret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The address without what every address has.
fn short(server: &ServerAddress) -> String {
    server.to_string().trim_start_matches("https://").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            servers: vec!["https://a.example:9345".parse().unwrap(), "https://[2001:db8::1]:7".parse().unwrap()],
            ca_hash: [7; 32],
            id: TokenId([1, 2, 3, 4, 5, 0xff]),
            secret: TokenSecret([9; SECRET_LEN]),
        }
    }

    #[test]
    fn a_token_survives_the_clipboard() {
        let text = token().reveal();
        assert!(text.reveal().starts_with("mesh1") && !text.reveal().contains(char::is_whitespace));
        assert_eq!(text.reveal().parse::<Token>().unwrap(), token());
        assert_eq!(Credential::parse(&format!(" {}\n", text.reveal())).unwrap(), Credential::Token(token()));
        assert_eq!(token().id.to_string().parse::<TokenId>().unwrap(), token().id);
    }

    #[test]
    fn a_damaged_token_is_never_a_shared_secret() {
        let text = token().reveal();
        let text = text.reveal();
        for cut in PREFIX.len()..text.len() {
            assert_eq!(Credential::parse(&text[..cut]), Err(BadToken::Damaged), "cut at {cut}");
        }
        for at in PREFIX.len()..text.len() {
            let mut bytes = text.as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            // The last character carries unused bits, which must be zero: changing it is damage too.
            assert_eq!(Credential::parse(&changed), Err(BadToken::Damaged), "changed at {at}");
        }
        assert!(Credential::parse(&text.replacen('e', " ", 1)).is_ok(), "no token at all: a secret");
        assert_eq!(Credential::parse(&format!("{} {}", &text[..20], &text[20..])), Err(BadToken::Blank));
        assert_eq!(Credential::parse("  "), Err(BadToken::Empty));
        assert!(matches!(Credential::parse("MESH1abc"), Err(BadToken::Damaged)));
        assert!(matches!(Credential::parse("my-shared-secret"), Ok(Credential::Shared(_))));
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?} {:?}", token(), Credential::Token(token()));
        assert!(!shown.contains("9, 9"), "{shown}");
    }
}
