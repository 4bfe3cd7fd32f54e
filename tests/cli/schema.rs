//! A validator for the JSON Schemas that udplb prints. It is strict: an object has no fields that its
//! schema does not name, and a keyword that the validator does not know is a panic.

use serde_json::Value;

/// Returns where and why a value does not follow a schema.
pub fn violation(schema: &Value, value: &Value) -> Option<String> {
    validate(schema, schema, value, "").err()
}

fn validate(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Some(keywords) = schema.as_object() else {
        return if schema == &Value::Bool(true) {
            Ok(())
        } else {
            Err(format!("{at}: not allowed"))
        };
    };
    for (keyword, content) in keywords {
        check(root, schema, (keyword, content), value, at)?;
    }
    Ok(())
}

fn check(
    root: &Value,
    schema: &Value,
    (keyword, content): (&str, &Value),
    value: &Value,
    at: &str,
) -> Result<(), String> {
    let unless = |good: bool| {
        if good { Ok(()) } else { Err(format!("{at}: {keyword} {content}, found {value}")) }
    };
    let all = || content.as_array().expect("a list");
    let validates = |schema: &Value| validate(root, schema, value, at).is_ok();
    match keyword {
        "$schema" | "title" | "description" | "definitions" | "default" | "format" => Ok(()),
        "$ref" => {
            let path = content.as_str().and_then(|path| path.strip_prefix('#')).expect("a path");
            let target = root.pointer(path).unwrap_or_else(|| panic!("no {path}"));
            validate(root, target, value, at)
        }
        "type" => match content {
            Value::Array(types) => unless(types.iter().any(|it| is_of(it, value))),
            only => unless(is_of(only, value)),
        },
        "enum" => unless(all().contains(value)),
        "const" => unless(content == value),
        "minimum" => {
            unless(value.as_f64().is_none_or(|it| it >= content.as_f64().expect("a number")))
        }
        "maximum" => {
            unless(value.as_f64().is_none_or(|it| it <= content.as_f64().expect("a number")))
        }
        "anyOf" => unless(all().iter().any(validates)),
        "oneOf" => unless(all().iter().filter(|schema| validates(schema)).count() == 1),
        "allOf" => all().iter().try_for_each(|schema| validate(root, schema, value, at)),
        "required" => {
            let has = |name: &Value| value.get(name.as_str().expect("a name")).is_some();
            unless(!value.is_object() || all().iter().all(has))
        }
        "items" => {
            let mut items = value.as_array().into_iter().flatten().enumerate();
            items.try_for_each(|(nth, item)| validate(root, content, item, &format!("{at}[{nth}]")))
        }
        "properties" => {
            let none = serde_json::Map::new();
            let others = schema.get("additionalProperties");
            for (name, field) in value.as_object().unwrap_or(&none) {
                let at = format!("{at}.{name}");
                match (content.get(name), others) {
                    (Some(schema), _) | (None, Some(schema)) => validate(root, schema, field, &at)?,
                    (None, None) => return Err(format!("{at}: no such field")),
                }
            }
            Ok(())
        }
        "additionalProperties" if schema.get("properties").is_some() => Ok(()),
        "additionalProperties" => {
            let mut fields = value.as_object().into_iter().flatten();
            fields.try_for_each(|(name, field)| {
                validate(root, content, field, &format!("{at}.{name}"))
            })
        }
        _ => panic!("{at}: keyword {keyword} {content}"),
    }
}

fn is_of(kind: &Value, value: &Value) -> bool {
    match kind.as_str().expect("a type") {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("type {other}"),
    }
}
