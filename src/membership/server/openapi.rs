//! The description of the API for programs: OpenAPI 3.1.

use serde_json::{Value, json};

/// The document.
pub(super) fn document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": { "title": "meshd control plane", "version": env!("CARGO_PKG_VERSION") },
        "paths": {
            "/livez": { "get": { "responses": { "200": { "description": "The process runs." } } } },
            "/readyz": { "get": { "responses": {
                "200": { "description": "Ready." },
                "503": { "description": "Not ready, with reasons." } } } },
            "/metrics": { "get": { "responses": { "200": { "description": "Prometheus' text format." } } } },
            "/v1/ca": { "get": { "responses": { "200": { "description": "The cluster's id and CA." } } } },
            "/v1/openapi.json": { "get": { "responses": { "200": { "description": "This document." } } } },
            "/v1/join": { "post": operation("Join with a token.", join()) },
            "/v1/pake/start": { "post": operation("Begin to prove the shared secret.", object(&[("message", text())], &[])) },
            "/v1/pake/finish": { "post": operation("Prove it, and join.", object(&[("proof", text()), ("join", join())], &[])) },
            "/v1/rejoin": { "post": operation("Come back with an old certificate.", join()) },
            "/v1/poll": { "post": operation("Heartbeat; answered when the node list changes, or after ten seconds.",
                object(&[], &[("revision", json!({ "type": ["integer", "null"], "minimum": 0 })),
                    ("no_wait", json!({ "type": "boolean" })),
                    ("reaches", json!({ "type": "array", "items": text() })),
                    ("paths", json!({ "type": "array", "maxItems": 16, "items": path() }))])) },
            "/v1/nodes": { "get": { "responses": responses() } },
            "/v1/matrix": { "get": { "summary": "Who reaches whom, as the nodes say that heartbeat at this server.",
                "responses": { "200": { "description": "A row for each of them.",
                    "content": { "application/json": { "schema": object(&[("rows", rows())], &[]) } } } } } },
            "/v1/audit": { "get": { "summary": "The audit log, the oldest line first; for servers' nodes alone.",
                "responses": responses() } },
            "/v1/self": { "put": operation("Say what changed about this node.", myself()) },
            "/v1/renew": { "post": operation("A certificate for the time to come.", object(&[("request", text())], &[])) },
            "/v1/leave": { "post": { "responses": responses() } },
            "/v1/servers": { "post": operation("Who the members of the servers' own etcd are; for servers' nodes alone.",
                object(&[], &[])) },
            "/v1/servers/join": { "post": operation("Add a further server's etcd to it; for servers' nodes alone.",
                object(&[("address", text())], &[])) },
            "/v1/servers/promote": { "post": operation("Make it a full member, once it has caught up.",
                object(&[], &[])) },
            "/v1/request": { "post": operation("What meshctl asks; for servers' nodes alone.",
                object(&[("op", text())], &[])) },
        }
    })
}

fn operation(summary: &str, body: Value) -> Value {
    json!({
        "summary": summary,
        "requestBody": { "required": true, "content": { "application/json": { "schema": body } } },
        "responses": responses(),
    })
}

fn responses() -> Value {
    let error = json!({ "application/json": { "schema": object(&[("code", text()), ("message", text())], &[]) } });
    json!({
        "200": { "description": "Done.", "content": { "application/json": {} } },
        "4XX": { "description": "Refused, and why.", "content": error },
        "5XX": { "description": "Not done, and why.", "content": error },
    })
}

fn rows() -> Value {
    let age = json!({ "type": "integer", "minimum": 0 });
    let to = json!({ "type": "array", "items": path() });
    json!({ "type": "array", "items": object(&[("from", text()), ("age_ms", age), ("to", to)], &[]) })
}

/// In a heartbeat `to` is a node's id, in a row its name.
fn path() -> Value {
    let count = json!({ "type": "integer", "minimum": 0 });
    object(
        &[("to", text()), ("up", json!({ "type": "boolean" }))],
        &[("rtt_us", count.clone()), ("loss_permille", count)],
    )
}

fn join() -> Value {
    let token = object(&[("id", text()), ("secret", text())], &[]);
    object(
        &[
            ("name", text()),
            ("role", json!({ "enum": ["agent", "server"] })),
            ("myself", myself()),
            ("request", text()),
            ("clock", json!({ "type": "integer" })),
        ],
        &[("control_only", json!({ "type": "boolean" })), ("token", token)],
    )
}

fn myself() -> Value {
    let texts = json!({ "type": "array", "items": text() });
    object(
        &[
            ("underlay", texts.clone()),
            ("public_keys", texts.clone()),
            ("encryption", json!({ "enum": ["none", "wireguard"] })),
        ],
        &[("labels", json!({ "type": "object", "additionalProperties": text() })), ("taints", texts)],
    )
}

fn object(required: &[(&str, Value)], optional: &[(&str, Value)]) -> Value {
    let names: Vec<_> = required.iter().map(|(name, _)| *name).collect();
    let all: serde_json::Map<_, _> =
        required.iter().chain(optional).map(|(name, of)| ((*name).to_owned(), of.clone())).collect();
    json!({ "type": "object", "required": names, "properties": all })
}

fn text() -> Value {
    json!({ "type": "string" })
}
