//! The reference of all words: the table in docs/configuration.md and the manual page udplb.yaml(5).

use std::fmt::Write as _;

use super::vocabulary::{
    ANNOUNCE_MAP, ANY, DECAP_MAP, DNS_MAP, FLOWS_MAP, Field, HEALTH_MAP, HTTP_MAP, INTERFACE_MAP,
    KEY_MAP, LOCAL, OPTIONS_MAP, PAYLOAD_MAP, RADIUS_MAP, ROOT_MAP, RULE_MAP, Root, SERVER_ID_MAP,
    SNMP_MAP, Shape, Table, UDP_MAP, UPSTREAM_MAP, list,
};

/// The maps of a file, with what stands before the names of their fields. A mirror has the fields of an
/// upstream.
const SECTIONS: [(&str, &Table); 17] = [
    ("", &ROOT_MAP),
    ("interfaces[].", &INTERFACE_MAP),
    ("announce.", &ANNOUNCE_MAP),
    ("flows.", &FLOWS_MAP),
    ("decap.", &DECAP_MAP),
    ("rules[].", &RULE_MAP),
    ("key.", &KEY_MAP),
    ("options.", &OPTIONS_MAP),
    ("options.payload.", &PAYLOAD_MAP),
    ("options.server-id.", &SERVER_ID_MAP),
    ("options.health.", &HEALTH_MAP),
    ("options.health.udp.", &UDP_MAP),
    ("options.health.http.", &HTTP_MAP),
    ("options.health.dns.", &DNS_MAP),
    ("options.health.snmp.", &SNMP_MAP),
    ("options.health.radius.", &RADIUS_MAP),
    ("upstream[].", &UPSTREAM_MAP),
];

/// Lines of docs/configuration.md between which its table of words stands.
pub const MARKS: (&str, &str) =
    ("<!-- words: UPDATE=1 cargo test --test config -->\n", "<!-- end of words -->\n");

/// Returns the table of all words in Markdown.
pub fn markdown() -> String {
    let mut text = String::from("| Word | Value | Default | Meaning |\n|---|---|---|---|\n");
    for (prefix, field) in fields() {
        let (name, about) = (field.name, field.about);
        let (value, default) = (value(field, Root::Map), default(field, Root::Map));
        let _ = writeln!(text, "| `{prefix}{name}` | {value} | {default} | {about} |");
    }
    let _ = write!(text, "\nA bare list of rules has fewer words: {}.\n", list_words());
    text
}

/// Returns udplb.yaml(5) in roff, with the verdicts and their meanings.
pub fn manual(verdicts: &[(&str, String)]) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut text = format!(
        ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n.TH udplb.yaml 5 \"\" \"udplb {version}\"\n\
         .SH NAME\nudplb.yaml \\- configuration of udplb\n.SH DESCRIPTION\n"
    );
    paragraph(&mut text, DESCRIPTION);
    text += ".SH WORDS\n";
    for (prefix, table) in SECTIONS {
        let _ = writeln!(text, ".SS \"Fields of {}\"", table.what);
        for field in table.fields {
            let (value, default) = (value(field, Root::Map), default(field, Root::Map));
            let meaning = format!("{} Value: {value}. Default: {default}.", field.about);
            let example = match field.example {
                "" => String::new(),
                example => format!(" Example: `{}: {example}`", field.name),
            };
            item(&mut text, &format!("{prefix}{}", field.name), &(meaning + &example));
        }
    }
    text += ".SS \"The bare list\"\n";
    paragraph(&mut text, &format!("A bare list of rules has fewer words: {}.", list_words()));
    text += ".SH VERDICTS\n";
    paragraph(
        &mut text,
        "Every packet of a rule ends in one counted verdict, and so does each copy.",
    );
    for (verdict, meaning) in verdicts {
        item(&mut text, verdict, meaning);
    }
    text += ".SH EXAMPLE\n.nf\n";
    for line in include_str!("../../examples/udplb.yaml").lines() {
        let _ = writeln!(text, "{}", escape(line));
    }
    text += ".fi\n.SH FILES\n";
    item(&mut text, "/etc/udplb.yaml", "Configuration of the service `udplb.service`.");
    text += ".SH SEE ALSO\n.BR udplb (1),\n.BR udplb-check (1),\n.BR udplb-apply (1)\n";
    text
}

const DESCRIPTION: &str = "A configuration is YAML, JSON, or TOML in a file called `*.toml`. It is a \
    map with `version: 1` and `rules`, or a bare list of rules. `udplb check FILE` validates it \
    without privileges, and `udplb apply FILE` applies it. Unknown words are errors.";

fn fields() -> impl Iterator<Item = (&'static str, &'static Field)> {
    SECTIONS
        .into_iter()
        .flat_map(|(prefix, table)| table.fields.iter().map(move |it| (prefix, *it)))
}

/// Describes the values that a field takes.
fn value(field: &Field, root: Root) -> String {
    match field.shape {
        Shape::Version => "`1`".into(),
        Shape::Name => "text of at most 64 bytes".into(),
        Shape::Interface => "interface".into(),
        Shape::Interfaces(_) => "list of interfaces, each a name or a map".into(),
        Shape::Address if root == Root::List => "IP address".into(),
        Shape::Address => format!("IP address or `{ANY}`"),
        Shape::Host if root == Root::List => "IP address or host name".into(),
        Shape::Host => format!("IP address, host name or `{LOCAL}`"),
        Shape::Port => "1 to 65535".into(),
        Shape::Ports if root == Root::List => "one port".into(),
        Shape::Ports => format!("port, range, list of both, or `{ANY}`"),
        Shape::PortRange => "range of ports".into(),
        Shape::Networks => "network, or list of networks".into(),
        Shape::Addresses => "list of addresses".into(),
        Shape::Number(number) => format!("{} to {}", number.first, number.last),
        Shape::Duration(limits) => format!("{} to {}", limits.first, limits.last),
        Shape::Switch => "`true` or `false`".into(),
        Shape::Choice(choice) => list(choice.usable(root)),
        Shape::ChoiceOrList(choice, _) if root == Root::List => list(choice.usable(root)),
        Shape::ChoiceOrList(choice, parts) => {
            format!("{}, or list of {}", list(choice.words), list(parts))
        }
        Shape::ChoiceOrEndpoint(choice) => {
            format!("{}, IP address, or `ADDRESS:PORT`", list(choice.usable(root)))
        }
        Shape::Words(words) => format!("{}, or list of them", list(words)),
        Shape::Text => "text".into(),
        Shape::HexDigits => "hexadecimal digits".into(),
        Shape::WordsOrMap(words, _) => {
            let words = words.iter().map(|word| format!("`{word}`, "));
            words.collect::<String>() + "or map"
        }
        Shape::Map(_) => "map".into(),
        Shape::Maps(_) => "list of maps".into(),
    }
}

/// Describes what holds where a field is missing.
fn default(field: &Field, root: Root) -> String {
    let word = match field.shape {
        Shape::Choice(choice)
        | Shape::ChoiceOrList(choice, _)
        | Shape::ChoiceOrEndpoint(choice) => choice.default_word(root),
        _ => None,
    };
    match (word, field.default) {
        (Some(word), _) => format!("`{word}`"),
        _ if field.required => "required".into(),
        (None, "") => "none".into(),
        (None, default) => default.into(),
    }
}

/// Lists the words of the bare list, with the values and defaults that differ there.
fn list_words() -> String {
    let words = fields().filter(|(_, field)| field.in_list).map(|(prefix, field)| {
        let of = |root| (value(field, root), default(field, root));
        let name = format!("`{}{}`", prefix.trim_start_matches("rules[]."), field.name);
        match of(Root::List) {
            same if same == of(Root::Map) => name,
            (value, _) if field.required => format!("{name} ({value})"),
            (value, default) => format!("{name} ({value}; default {default})"),
        }
    });
    words.collect::<Vec<_>>().join(", ")
}

fn paragraph(text: &mut String, line: &str) {
    let _ = writeln!(text, "{}", escape(line));
}

fn item(text: &mut String, name: &str, meaning: &str) {
    let _ = writeln!(text, ".TP\n\\fB{}\\fR\n{}", escape(name), escape(meaning));
}

/// Returns a line as roff takes it: text between backticks is bold.
fn escape(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\*(Aq");
    let mut bold = false;
    let pieces = line.split('`').map(|piece| {
        let font = if bold { "\\fB" } else { "\\fR" };
        bold = !bold;
        format!("{font}{piece}")
    });
    // A font at its start keeps a line from being a request.
    let line: String = pieces.collect();
    format!("\\&{}", line.strip_prefix("\\fR").unwrap_or(&line))
}
