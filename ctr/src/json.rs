//! Any message of the API as JSON, by its descriptor.
//!
//! Field names are those of the .proto files; empty fields are left out; times are RFC 3339; enums
//! are their names; an `Any` is shown by its content where that is JSON or a message known here,
//! else as `type_url` and base-16 `value`.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, MapKey, ReflectMessage, Value as Field};
use serde_json::{Map, Value};

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET).expect("the descriptors are compiled in and tested")
});

/// A message as JSON.
pub(crate) fn of<M: prost::Name>(message: &M) -> Value {
    by_name(&M::full_name(), &message.encode_to_vec()).unwrap_or(Value::Null)
}

/// Prints messages as a JSON array.
pub(crate) fn print_list<M: prost::Name>(messages: &[M]) -> anyhow::Result<()> {
    print(&Value::Array(messages.iter().map(of).collect()))
}

/// Prints JSON, indented.
pub(crate) fn print(value: &Value) -> anyhow::Result<()> {
    crate::output::print(&text(value)?)
}

/// JSON, indented, with a line's end.
pub(crate) fn text(value: &Value) -> anyhow::Result<String> {
    let mut out = Vec::new();
    let indent = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    serde::Serialize::serialize(value, &mut serde_json::Serializer::with_formatter(&mut out, indent))?;
    out.push(b'\n');
    Ok(String::from_utf8(out)?)
}

/// The content of an `Any`.
pub(crate) fn of_any(any: &prost_types::Any) -> Value {
    // Runtime specs and their parts travel as JSON; their URLs name a folder before the type.
    if any.type_url.contains('/')
        && let Ok(value) = serde_json::from_slice(&any.value)
    {
        return value;
    }
    by_name(proto::any::name(any), &any.value).unwrap_or_else(|| {
        let hex: String = any.value.iter().map(|byte| format!("{byte:02x}")).collect();
        serde_json::json!({ "type_url": any.type_url, "value": hex })
    })
}

fn by_name(name: &str, bytes: &[u8]) -> Option<Value> {
    let descriptor = POOL.get_message_by_name(name)?;
    Some(message(&DynamicMessage::decode(descriptor, bytes).ok()?))
}

fn message(message: &DynamicMessage) -> Value {
    match message.descriptor().full_name() {
        "google.protobuf.Timestamp" => {
            return match message.transcode_to::<prost_types::Timestamp>() {
                Ok(timestamp) => Value::String(crate::output::time(Some(&timestamp))),
                Err(_) => Value::Null,
            };
        }
        "google.protobuf.Any" => {
            return match message.transcode_to::<prost_types::Any>() {
                Ok(any) => of_any(&any),
                Err(_) => Value::Null,
            };
        }
        _ => {}
    }
    // By number, which is the order of the .proto file.
    let mut fields: Vec<_> = message.fields().collect();
    fields.sort_by_key(|(descriptor, _)| descriptor.number());
    let mut map = Map::new();
    for (descriptor, value) in fields {
        let value = match (value, descriptor.kind()) {
            (Field::EnumNumber(number), prost_reflect::Kind::Enum(kind)) => match kind.get_value(*number) {
                Some(value) => Value::String(value.name().to_owned()),
                None => Value::from(*number),
            },
            (value, _) => field(value),
        };
        map.insert(descriptor.name().to_owned(), value);
    }
    Value::Object(map)
}

fn field(value: &Field) -> Value {
    match value {
        Field::Bool(value) => Value::from(*value),
        Field::I32(value) => Value::from(*value),
        Field::I64(value) => Value::from(*value),
        Field::U32(value) => Value::from(*value),
        Field::U64(value) => Value::from(*value),
        Field::F32(value) => Value::from(*value),
        Field::F64(value) => Value::from(*value),
        Field::String(value) => Value::from(value.as_str()),
        Field::Bytes(value) => Value::from(String::from_utf8_lossy(value)),
        Field::EnumNumber(value) => Value::from(*value),
        Field::Message(value) => message(value),
        Field::List(list) => list.iter().map(field).collect(),
        Field::Map(map) => {
            let mut pairs: Vec<(String, Value)> =
                map.iter().map(|(key, value)| (key_text(key), field(value))).collect();
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(pairs.into_iter().collect())
        }
    }
}

fn key_text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::containerd::services::containers::v1::Container;
    use proto::containerd::services::containers::v1::container::Runtime;

    #[test]
    fn messages_show_what_they_hold() {
        let options =
            proto::containerd::runc::v1::Options { binary_name: "crun".into(), ..Default::default() };
        let container = Container {
            id: "c".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            runtime: Some(Runtime { name: "r".into(), options: Some(proto::any::pack(&options)) }),
            spec: Some(proto::any::wrap(proto::any::SPEC, *b"{\"ociVersion\":\"1\"}")),
            created_at: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
            extensions: [("x".to_owned(), proto::any::wrap("unknown.Type", [1, 255]))].into(),
            ..Container::default()
        };
        assert_eq!(
            of(&container),
            serde_json::json!({
                "id": "c",
                "labels": {"a": "b"},
                "runtime": {"name": "r", "options": {"binary_name": "crun"}},
                "spec": {"ociVersion": "1"},
                "created_at": "1970-01-01T00:00:01Z",
                "extensions": {"x": {"type_url": "unknown.Type", "value": "01ff"}},
            })
        );
    }

    #[test]
    fn enums_show_their_names() {
        let process =
            proto::containerd::v1::types::Process { id: "a".into(), status: 2, ..Default::default() };
        assert_eq!(of(&process)["status"], "RUNNING");
    }
}
