//! The filter language of every List and of Subscribe.
//!
//! ```text
//! filter    = selector { "," selector }              all must hold; several filters: one must hold
//! selector  = fieldpath [ operator value ]           without operator: the field is present
//! fieldpath = field { "." field }                    a field is [A-Za-z0-9_]+ or "quoted"
//! operator  = "==" | "!=" | "~="                     ~= is an unanchored regular expression
//! value     = unquoted up to a comma | "quoted"      after ~= also /quoted/ and |quoted|
//! ```
//!
//! An absent field equals nothing, matches nothing, is not present, and `!=` is true of it.

use std::borrow::Cow;

use regex::Regex;

use crate::error::{Error, Result};

/// The longest filter that is parsed, in bytes.
const FILTER_MAX: usize = 16 * 1024;
/// The largest compiled regular expression, in bytes.
const REGEX_MAX: usize = 1 << 20;
/// What all those of a list may take together, in bytes; each may have its share. A short one has a few thousand, and some of ten
/// letters a million.
const REGEXES_MAX: usize = 16 << 20;

/// A parsed list of filters; an empty list accepts everything.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    any: Vec<Vec<Selector>>,
}

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    /// Parses filters of which one must hold; InvalidArgument names the place of a mistake.
    pub fn parse_all<S: AsRef<str>>(filters: &[S]) -> Result<Self> {
        let expressions: usize = filters.iter().map(|text| text.as_ref().matches("~=").count()).sum();
        let share = (REGEXES_MAX / expressions.max(1)).min(REGEX_MAX);
        let any = filters.iter().map(|text| Parser::parse(text.as_ref(), share)).collect::<Result<_>>()?;
        Ok(Filter { any })
    }

    /// Whether an object passes. `field` gives the value of a field path, or None where the object has no such field.
    pub fn matches<'a>(&self, field: impl Fn(&[&str]) -> Option<Cow<'a, str>>) -> bool {
        self.any.is_empty() || self.any.iter().any(|all| all.iter().all(|selector| selector.holds(&field)))
    }
}

impl Selector {
    fn holds<'a>(&self, field: impl Fn(&[&str]) -> Option<Cow<'a, str>>) -> bool {
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        let value = field(&path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(want) => value.as_deref() == Some(want.as_str()),
            Test::NotEqual(want) => value.as_deref() != Some(want.as_str()),
            Test::Matches(regex) => value.is_some_and(|value| regex.is_match(&value)),
        }
    }
}

/// The value of `labels.KEY` for a filter; the key may itself hold dots, quoted or not.
pub fn label<'a>(
    labels: &'a std::collections::BTreeMap<String, String>,
    rest: &[&str],
) -> Option<Cow<'a, str>> {
    labels.get(&rest.join(".")).map(|value| Cow::Borrowed(value.as_str()))
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    /// The largest compiled regular expression.
    share: usize,
}

impl<'a> Parser<'a> {
    fn parse(text: &'a str, share: usize) -> Result<Vec<Selector>> {
        if text.len() > FILTER_MAX {
            return Err(Error::invalid_argument(format!(
                "filter of {} bytes is too long; at most {FILTER_MAX} are allowed",
                text.len()
            )));
        }
        if text.is_empty() {
            // Of no selectors all hold: it lets everything pass, as containerd's.
            return Ok(Vec::new());
        }
        let mut parser = Parser { text, at: 0, share };
        let mut all = vec![parser.selector()?];
        loop {
            parser.skip_space();
            match parser.peek() {
                None => return Ok(all),
                Some(',') => {
                    parser.at += 1;
                    all.push(parser.selector()?);
                }
                Some(_) => return Err(parser.error("unexpected input")),
            }
        }
    }

    fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::invalid_argument(format!(
            "filter {:?}: {what} at byte {} (expected e.g. name==x or labels.\"a.b\"~=^x)",
            self.text, self.at
        ))
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn skip_space(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.field()?];
        self.skip_space();
        while self.peek() == Some('.') {
            self.at += 1;
            path.push(self.field()?);
            self.skip_space();
        }
        let rest = &self.text[self.at..];
        if rest.is_empty() || rest.starts_with(',') {
            return Ok(Selector { path, test: Test::Present });
        }
        let operator: String = rest.chars().take_while(|c| matches!(c, '=' | '!' | '~')).collect();
        if !matches!(operator.as_str(), "==" | "!=" | "~=") {
            return Err(self.error("expected one of ==, !=, ~="));
        }
        self.at += operator.len();
        let value = self.value(operator == "~=")?;
        let test = match operator.as_str() {
            "==" => Test::Equal(value),
            "!=" => Test::NotEqual(value),
            _ => Test::Matches(
                regex::RegexBuilder::new(&value)
                    .size_limit(self.share)
                    .dfa_size_limit(self.share)
                    .build()
                    .map_err(|error| self.error(format_args!("bad regular expression: {error}")))?,
            ),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String> {
        self.skip_space();
        if self.peek() == Some('"') {
            return self.quoted('"');
        }
        let rest = &self.text[self.at..];
        let len = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
        if len == 0 {
            return Err(self.error("expected a field name or a quoted one"));
        }
        self.at += len;
        Ok(rest[..len].to_owned())
    }

    fn value(&mut self, alternative_quotes: bool) -> Result<String> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted('"'),
            Some(quote @ ('/' | '|')) if alternative_quotes => self.quoted(quote),
            Some('/' | '|') => Err(self.error("this value must be put in double quotes")),
            _ => {
                let rest = &self.text[self.at..];
                let len = rest
                    .find(|c: char| c == ',' || c.is_whitespace() || c.is_control())
                    .unwrap_or(rest.len());
                if len == 0 {
                    return Err(self.error("expected a value"));
                }
                self.at += len;
                Ok(rest[..len].to_owned())
            }
        }
    }

    /// Reads a quoted text with Go's escapes; for `/` and `|` quotes, which hold regular expressions, an escape other
    /// than of the quote itself stays as it is written.
    fn quoted(&mut self, quote: char) -> Result<String> {
        let start = self.at;
        self.at += quote.len_utf8();
        let mut out = String::new();
        while let Some(c) = self.peek() {
            self.at += c.len_utf8();
            if c == quote {
                return Ok(out);
            }
            if c == '\n' {
                break;
            }
            if c != '\\' {
                out.push(c);
                continue;
            }
            let Some(escaped) = self.peek() else { break };
            self.at += escaped.len_utf8();
            match escaped {
                c if c == quote => out.push(c),
                c if quote != '"' => {
                    out.push('\\');
                    out.push(c);
                }
                '\\' => out.push('\\'),
                'a' => out.push('\u{7}'),
                'b' => out.push('\u{8}'),
                'f' => out.push('\u{c}'),
                'n' => out.push('\n'),
                'r' => out.push('\r'),
                't' => out.push('\t'),
                'v' => out.push('\u{b}'),
                'x' => out.push(self.code_point(2)?),
                'u' => out.push(self.code_point(4)?),
                'U' => out.push(self.code_point(8)?),
                _ => return Err(self.error("unknown escape in a quoted text")),
            }
        }
        self.at = start;
        Err(self.error("quoted text is not ended"))
    }

    fn code_point(&mut self, digits: usize) -> Result<char> {
        let value = self
            .text
            .get(self.at..self.at + digits)
            .filter(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .and_then(|hex| u32::from_str_radix(hex, 16).ok())
            .and_then(char::from_u32)
            .ok_or_else(|| self.error(format_args!("expected {digits} hex digits of a character")))?;
        self.at += digits;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn object<'a>(path: &[&str]) -> Option<Cow<'a, str>> {
        match path {
            ["name"] => Some("docker.io/library/busybox:latest".into()),
            ["id"] => Some("c1".into()),
            ["empty"] => Some("".into()),
            ["labels", rest @ ..] => match rest.join(".").as_str() {
                "a.b/c" => Some("x y".into()),
                "plain" => Some("1".into()),
                _ => None,
            },
            _ => None,
        }
    }

    fn passes(filter: &str) -> bool {
        Filter::parse_all(&[filter]).unwrap().matches(object)
    }

    #[test]
    fn language() {
        assert!(Filter::parse_all::<&str>(&[]).unwrap().matches(object));
        for yes in [
            "name==docker.io/library/busybox:latest",
            "name~=busybox",
            "name~=/^docker\\.io\\//",
            "name~=|busy(box)?:|",
            "name~=\"^docker\\\\.io\"",
            "id==c1,name~=box",
            "id != c2",
            "absent!=x",
            "id",
            "empty",
            "labels.plain",
            "labels.\"a.b/c\"==\"x y\"",
            "labels.plain==1",
            "\"id\"==\"\\x63\\u0031\"",
        ] {
            assert!(passes(yes), "{yes}");
        }
        for no in
            ["id==c2", "absent", "absent==x", "absent~=x", "id==c1,name==x", "name~=^busybox", "empty==x"]
        {
            assert!(!passes(no), "{no}");
        }
        assert!(Filter::parse_all(&["id==no", "id==c1"]).unwrap().matches(object));
        assert!(Filter::parse_all::<&str>(&[]).unwrap().matches(object));
        assert!(Filter::parse_all(&["id==no", ""]).unwrap().matches(object));
    }

    #[test]
    fn mistakes_are_invalid_arguments() {
        for bad in [
            " ",
            ",",
            "a.",
            "a=b",
            "a==",
            "a===b",
            "a==b c",
            "a~=(",
            "a==\"b",
            "a==/b/",
            "a.\"\\q\"",
            "a~=\"\\xZZ\"",
            "ä==1",
        ] {
            assert!(matches!(Filter::parse_all(&[bad]), Err(Error::InvalidArgument(_))), "{bad:?}");
        }
        assert!(Filter::parse_all(&["a".repeat(FILTER_MAX + 1)]).is_err());
    }

    #[test]
    fn many_expressions_are_refused() {
        let large = r"name~=\w{10}";
        assert!(Filter::parse_all(&[large]).is_ok());
        let error = Filter::parse_all(&[large; 1000]).unwrap_err();
        assert!(error.to_string().contains("regular expression"), "{error}");
        let one = vec![large; 1000].join(",");
        assert!(Filter::parse_all(&[one]).is_err());
        // As a client has it that asks for many by the beginnings of their names.
        let many: Vec<String> = (0..1000).map(|at| format!("id~=^{at:012}.*$")).collect();
        assert!(Filter::parse_all(&many).unwrap().matches(|_| Some("000000000999abc".into())));
    }

    proptest! {
        #[test]
        fn never_panics(text in "[ -~ä\\n]{0,40}") {
            let _ = Filter::parse_all(&[text]).map(|filter| filter.matches(object));
        }

        #[test]
        fn a_quoted_value_is_found_as_written(value in "[ -~]{0,20}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let filter = Filter::parse_all(&[format!("f==\"{quoted}\"")]).unwrap();
            prop_assert!(filter.matches(|path| (path == ["f"]).then(|| Cow::Owned(value.clone()))));
        }
    }
}
