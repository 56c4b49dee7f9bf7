//! `node` and `token`: what is asked of the cluster's servers.

use meshd::admin::client::Client;
use meshd::admin::protocol::{ForeignView, TokenMade, TokenView};
use meshd::admin::render;
use meshd::membership::link;
use meshd::membership::record::Role;
use serde_json::{Value, json};

use crate::args::{Lifetime, NodeAction, TokenAction};
use crate::screen::Screen;

pub(crate) fn node(client: &Client, screen: &Screen, action: &NodeAction) -> anyhow::Result<()> {
    let (request, done) = match action {
        NodeAction::Commands { name, there } => {
            let foreign = client.node_commands(name, &there.device, &there.private_key_file)?;
            return screen.print(&foreign, || render::cluster::recipe(&foreign));
        }
        NodeAction::Add { name, underlay, subnets, mac, public_key, there: _ } => (
            link::Request::NodeAdd {
                name: name.clone(),
                underlay: underlay.clone(),
                subnets: subnets.clone(),
                mac: mac.clone(),
                public_key: public_key.clone(),
            },
            format!("{name} is a member"),
        ),
        NodeAction::Drain { name } => (
            link::Request::NodeDrain { name: name.clone() },
            format!(
                "{name} is draining: others open no new flows to its services; `meshctl node undrain {name}` ends that"
            ),
        ),
        NodeAction::Undrain { name } => {
            (link::Request::NodeUndrain { name: name.clone() }, format!("{name} is drained no more"))
        }
        NodeAction::Remove { name } => (
            link::Request::NodeRemove { name: name.clone() },
            format!(
                "{name} is removed: nobody talks to it any more; to come back it needs a new token, or `meshctl node add` where meshd does not run"
            ),
        ),
    };
    let mut answer: Value = client.cluster(request)?;
    let mut recipe = String::new();
    if let NodeAction::Add { name, there, .. } = action {
        // it is a member by now, whatever becomes of the rest
        let foreign = client.node_commands(name, &there.device, &there.private_key_file).unwrap_or_else(|error| {
            let later = format!("what to run there is not known yet ({error}): try `meshctl node commands {name}`");
            ForeignView { name: name.clone(), commands: Vec::new(), notes: vec![later] }
        });
        recipe = format!("# To be run there, as root:\n{}", render::cluster::recipe(&foreign));
        if let Value::Object(fields) = &mut answer {
            fields.insert("commands".to_owned(), json!(foreign.commands));
            fields.insert("notes".to_owned(), json!(foreign.notes));
        }
    }
    screen.print(&answer, || {
        let subnets = answer.get("subnets").and_then(Value::as_array).into_iter().flatten();
        let subnets: Vec<&str> = subnets.filter_map(Value::as_str).collect();
        let subnets = if subnets.is_empty() { String::new() } else { format!(", with {}", subnets.join(" and ")) };
        // with a recipe all of it may be handed to a shell there
        let comment = if recipe.is_empty() { "" } else { "# " };
        format!("{comment}{done}{subnets}\n{recipe}")
    })
}

pub(crate) fn token(client: &Client, screen: &Screen, action: &TokenAction) -> anyhow::Result<()> {
    match action {
        TokenAction::Create { role, ttl: Lifetime(ttl), uses, node, print_join, print_script } => {
            let request = link::Request::TokenCreate {
                role: if role == "server" { Role::Server } else { Role::Agent },
                ttl: ttl.map(|ttl| ttl.as_secs()),
                uses: *uses,
                node: node.clone(),
            };
            let made: TokenMade = client.cluster(request)?;
            let print = match (print_join, print_script) {
                (true, _) => Some(("join", render::cluster::join_line(&made.token, role))),
                (_, true) => Some(("script", render::cluster::join_script(&made.token, role))),
                _ => None,
            };
            let mut document = json!(made);
            if let Some((key, text)) = &print {
                document[key] = json!(text);
            }
            screen.print(&document, || {
                print.as_ref().map_or_else(|| format!("{}\n", made.token), |(_, text)| text.clone())
            })
        }
        TokenAction::List => {
            let tokens: Vec<TokenView> = client.cluster(link::Request::TokenList)?;
            screen.print(&tokens, || render::cluster::tokens(&tokens, screen.look))
        }
        TokenAction::Revoke { id } => {
            let answer: Value = client.cluster(link::Request::TokenRevoke { id: id.clone() })?;
            let id = answer.get("id").and_then(Value::as_str).unwrap_or(id);
            screen.print(&answer, || format!("the token {id} is revoked: nobody joins with it any more\n"))
        }
    }
}
