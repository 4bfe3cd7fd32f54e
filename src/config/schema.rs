//! The JSON Schema of a configuration file, for editors.

use serde_json::{Map, Value, json};

use super::host::INTERFACE;
use super::vocabulary::{ANY, DECAP, Field, ROOT_MAP, RULE_MAP, RULES, Root, Shape, Table};

/// JSON Schema (draft-07) of both forms of a file.
pub fn schema() -> Value {
    let mut document = map(&ROOT_MAP, Root::Map);
    let needs = |field: &Field| json!({ "required": [field.name] });
    document["anyOf"] = json!([needs(&RULES), needs(&DECAP)]);
    let mut list = rules(Root::List);
    list["description"] = "The bare list of rules.".into();
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "udplb configuration",
        "oneOf": [document, list],
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
        Shape::Interface => interface(),
        Shape::Interfaces(table) => json!({
            "type": "array",
            "items": { "anyOf": [interface(), map(table, root)] },
            "uniqueItems": true,
        }),
        Shape::Address if root == Root::List => address(),
        Shape::Address => json!({ "anyOf": [address(), { "enum": [ANY] }] }),
        Shape::Host => {
            let scoped = format!(r"^[fF][eE][89abAB][0-9a-fA-F]:.*%[^\s/:]{{1,{INTERFACE}}}$");
            let scoped = json!({ "type": "string", "pattern": scoped });
            json!({ "anyOf": [address(), scoped, { "type": "string", "format": "hostname" }] })
        }
        Shape::Port => port(),
        Shape::Ports if root == Root::List => port(),
        Shape::Ports => ports(),
        Shape::PortRange => port_range(),
        Shape::Networks => networks(),
        Shape::Addresses => json!({ "type": "array", "items": address(), "minItems": 1 }),
        Shape::Number(number) => {
            json!({ "type": "integer", "minimum": number.first, "maximum": number.last })
        }
        Shape::Duration(_) => json!({ "type": "string", "pattern": "^[0-9]+(ms|s|m|h)$" }),
        Shape::Switch => json!({ "type": "boolean" }),
        Shape::Choice(choice) => json!({ "enum": choice.usable(root) }),
        Shape::ChoiceOrList(choice, _) if root == Root::List => {
            json!({ "enum": choice.usable(root) })
        }
        Shape::ChoiceOrList(choice, words) => json!({ "anyOf": [
            { "enum": choice.words },
            { "type": "array", "items": { "enum": words }, "minItems": 2, "uniqueItems": true },
        ] }),
        Shape::ChoiceOrEndpoint(choice) => {
            let with_port = r"^(\[[0-9a-fA-F.:]+\]|[0-9.]+):[0-9]{1,5}$";
            let with_port = json!({ "type": "string", "pattern": with_port });
            json!({ "anyOf": [{ "enum": choice.usable(root) }, address(), with_port] })
        }
        Shape::Words(words) => {
            let several = json!({ "type": "array", "items": { "enum": words }, "minItems": 1 });
            json!({ "anyOf": [{ "enum": words }, several] })
        }
        Shape::Map(table) => map(table, root),
        Shape::Maps(table) => json!({ "type": "array", "items": map(table, root) }),
        Shape::Text => json!({ "type": "string" }),
        Shape::HexDigits => json!({ "type": "string", "pattern": "^([0-9a-fA-F]{2}){1,8}$" }),
        Shape::WordsOrMap(words, table) => {
            json!({ "anyOf": [{ "enum": words }, map(table, root)] })
        }
    };
    value["description"] = field.about.into();
    if let Shape::Choice(choice) | Shape::ChoiceOrList(choice, _) | Shape::ChoiceOrEndpoint(choice) =
        field.shape
        && let Some(word) = choice.default_word(root)
    {
        value["default"] = word.into();
    }
    value
}

fn interface() -> Value {
    json!({ "type": "string", "pattern": format!(r"^[^\s/:]{{1,{INTERFACE}}}$") })
}

fn address() -> Value {
    json!({ "type": "string", "anyOf": [{ "format": "ipv4" }, { "format": "ipv6" }] })
}

fn networks() -> Value {
    let one = json!({ "type": "string", "pattern": r"^[0-9a-fA-F.:]+(/[0-9]{1,3})?$" });
    json!({ "anyOf": [one, { "type": "array", "items": one, "minItems": 1 }] })
}

fn port() -> Value {
    json!({
        "anyOf": [
            { "type": "integer", "minimum": 1, "maximum": 65535 },
            { "type": "string", "pattern": "^[1-9][0-9]{0,4}$" },
        ]
    })
}

fn port_range() -> Value {
    let range = json!({
        "type": "string",
        "pattern": "^[1-9][0-9]{0,4} *- *[1-9][0-9]{0,4}$",
    });
    json!({ "anyOf": [port(), range] })
}

fn ports() -> Value {
    let one = port_range();
    let several = json!({ "type": "array", "items": one, "minItems": 1 });
    json!({ "anyOf": [one, several, { "enum": [ANY] }] })
}
