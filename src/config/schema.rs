//! The JSON Schema of a configuration file, for editors.

use serde_json::{Map, Value, json};

use super::scalar::INTERFACE;
use super::vocabulary::{Field, ROOT_MAP, RULE_MAP, Root, Shape, Table};

/// JSON Schema (draft-07) of both forms of a file, with the words that can be used today.
pub fn schema() -> Value {
    let mut list = rules(Root::List);
    list["description"] = "The bare list of rules.".into();
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "udplb configuration",
        "oneOf": [map(&ROOT_MAP, Root::Map), list],
    })
}

fn rules(root: Root) -> Value {
    json!({ "type": "array", "items": map(&RULE_MAP, root) })
}

fn map(table: &Table, root: Root) -> Value {
    let usable = || table.fields.iter().filter(|field| field.is_usable(root));
    let properties: Map<String, Value> =
        usable().map(|field| (field.name.into(), property(field, root))).collect();
    let required: Vec<_> =
        usable().filter(|field| field.required).map(|field| field.name).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn property(field: &Field, root: Root) -> Value {
    let mut value = match field.shape {
        Shape::Version => json!({ "const": 1 }),
        Shape::Name => json!({ "type": "string", "pattern": r"^[^\s/]{1,64}$" }),
        Shape::Interfaces => interfaces(),
        Shape::Address => json!({ "type": "string", "format": "ipv4" }),
        Shape::Host => {
            json!({ "type": "string", "anyOf": [{ "format": "ipv4" }, { "format": "hostname" }] })
        }
        Shape::Port => port(),
        Shape::Ports if root == Root::List => port(),
        Shape::Ports => ports(),
        Shape::Choice(choice) => json!({ "enum": choice.usable(root) }),
        Shape::Map(table) => map(table, root),
        Shape::Maps(table) => json!({ "type": "array", "items": map(table, root) }),
        Shape::Later => Value::Bool(false),
    };
    if value.is_object() {
        value["description"] = field.about.into();
    }
    if let Shape::Choice(choice) = field.shape
        && let Ok(word) = choice.default_word(root)
    {
        value["default"] = word.name.into();
    }
    value
}

fn interfaces() -> Value {
    let name = format!(r"^[^\s/:]{{1,{INTERFACE}}}$");
    json!({
        "type": "array",
        "items": { "type": "string", "pattern": name },
        "uniqueItems": true,
    })
}

fn port() -> Value {
    json!({
        "anyOf": [
            { "type": "integer", "minimum": 1, "maximum": 65535 },
            { "type": "string", "pattern": "^[1-9][0-9]{0,4}$" },
        ]
    })
}

fn ports() -> Value {
    let range = json!({
        "type": "string",
        "pattern": "^[1-9][0-9]{0,4} *- *[1-9][0-9]{0,4}$",
    });
    let one = json!({ "anyOf": [port(), range] });
    json!({ "anyOf": [one, { "type": "array", "items": one, "minItems": 1 }] })
}
