//! From a pattern's text to alternatives that an automaton can match.
//!
//! The subset is what tokenizer files use: classes, groups, greedy and possessive quantifiers, `(?i:...)` over ASCII, and one
//! look-ahead at the end of an alternative. Everything else is refused with its name: the dialects disagree about it.

use std::iter::Peekable;
use std::str::Chars;

use regex_syntax::hir::{self, Class, ClassUnicode, ClassUnicodeRange, Hir, Look};
use serde::{Deserialize, Serialize};

use crate::tokenizer::unicode;

const MAX_DEPTH: usize = 50;
const MAX_REPEATS: u32 = 1000;

/// Pairs of letters that Oniguruma also matches with one character ("ß", "ﬁ", ...) when it ignores case.
const FOLDED_PAIRS: [&str; 5] = ["ss", "ff", "fi", "fl", "st"];

/// Whose regular expressions a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dialect {
    /// Hugging Face tokenizers. `$` is the end of a line there and `{n,m}+` repeats a repetition: both are refused.
    Oniguruma,
    /// tiktoken. `$` is the end of the text and `{n,m}+` is possessive.
    Fancy,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    Class(ClassUnicode),
    Concat(Vec<Node>),
    Alternation(Vec<Node>),
    Repeat {
        node: Box<Node>,
        min: u32,
        max: Option<u32>,
        possessive: bool,
    },
    /// The next character must be in the class (or, negated, there must be none or another).
    LookAhead {
        negated: bool,
        class: ClassUnicode,
    },
    End,
}

/// What `pattern` says.
pub(super) fn tree(pattern: &str, dialect: Dialect) -> Result<Node, String> {
    let mut parser = Parser { rest: pattern.chars().peekable(), dialect, depth: 0 };
    let node = parser.alternation(false)?;
    if parser.rest.peek().is_some() { Err("an unmatched )".into()) } else { Ok(node) }
}

/// The alternatives of a tree in order of preference; true where the last character read is given back.
pub(super) fn alternatives(tree: Node) -> Result<Vec<(Hir, bool)>, String> {
    let mut found = Vec::new();
    flatten(tree, &mut found)?;
    Ok(found)
}

fn flatten(node: Node, found: &mut Vec<(Hir, bool)>) -> Result<(), String> {
    match node {
        Node::Alternation(nodes) => nodes.into_iter().try_for_each(|node| flatten(node, found)),
        Node::Concat(mut nodes) if matches!(nodes.last(), Some(Node::LookAhead { .. })) => {
            let Some(Node::LookAhead { negated, class }) = nodes.pop() else { unreachable!("just matched") };
            // Only of one repeated class is it certain that the longest candidate is the preferred one.
            let [Node::Repeat { node, min: 1.., max: None, possessive: false }] = &nodes[..] else {
                return Err("a look-ahead behind anything but one repeated class".into());
            };
            if !matches!(**node, Node::Class(_)) {
                return Err("a look-ahead behind anything but one repeated class".into());
            }
            let body = hir(Node::Concat(nodes), true)?;
            let mut next = class;
            if negated {
                next.negate();
                found.push((Hir::concat(vec![body.clone(), Hir::look(Look::End)]), false));
            }
            found.push((Hir::concat(vec![body, Hir::class(Class::Unicode(next))]), true));
            Ok(())
        }
        node => {
            found.push((hir(node, false)?, false));
            Ok(())
        }
    }
}

/// `followed`: whether anything of the pattern stands behind the node.
fn hir(node: Node, followed: bool) -> Result<Hir, String> {
    Ok(match node {
        Node::Class(class) => Hir::class(Class::Unicode(class)),
        Node::Concat(nodes) => {
            let mut hirs = Vec::with_capacity(nodes.len());
            for (at, node) in nodes.iter().enumerate() {
                let behind = &nodes[at + 1..];
                check_possessive(node, behind, followed)?;
                hirs.push(hir(node.clone(), followed || !behind.is_empty())?);
            }
            Hir::concat(hirs)
        }
        Node::Alternation(nodes) => {
            nodes.iter().try_for_each(|node| check_possessive(node, &[], followed))?;
            Hir::alternation(nodes.into_iter().map(|node| hir(node, followed)).collect::<Result<_, _>>()?)
        }
        Node::Repeat { node, min, max, .. } => {
            check_possessive(&node, &[], true)?;
            Hir::repetition(hir::Repetition { min, max, greedy: true, sub: Box::new(hir(*node, true)?) })
        }
        Node::LookAhead { .. } => return Err("a look-ahead inside an alternative".into()),
        Node::End => Hir::look(Look::End),
    })
}

/// A possessive quantifier equals a greedy one where nothing behind it could use what it took.
fn check_possessive(node: &Node, behind: &[Node], followed: bool) -> Result<(), String> {
    let Node::Repeat { node, possessive: true, .. } = node else { return Ok(()) };
    let Node::Class(class) = &**node else { return Err("a possessive quantifier behind a group".into()) };
    for next in behind {
        let (next, optional) = match next {
            Node::Class(next) => (next, false),
            Node::Repeat { node, min, .. } => match &**node {
                Node::Class(next) => (next, *min == 0),
                _ => return Err("a possessive quantifier before a group".into()),
            },
            Node::End => return Ok(()),
            _ => return Err("a possessive quantifier before a group".into()),
        };
        let mut common = class.clone();
        common.intersect(next);
        if common.iter().next().is_some() {
            return Err("a possessive quantifier before a class that it shares characters with".into());
        }
        if !optional {
            return Ok(());
        }
    }
    if followed { Err("a possessive quantifier at the end of a group".into()) } else { Ok(()) }
}

struct Parser<'p> {
    rest: Peekable<Chars<'p>>,
    dialect: Dialect,
    depth: usize,
}

impl Parser<'_> {
    fn take(&mut self, wanted: char) -> bool {
        self.rest.next_if_eq(&wanted).is_some()
    }

    fn looks_at(&self, wanted: &str) -> bool {
        let mut rest = self.rest.clone();
        wanted.chars().all(|c| rest.next() == Some(c))
    }

    fn alternation(&mut self, fold: bool) -> Result<Node, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("a pattern nested more than {MAX_DEPTH} deep"));
        }
        let mut nodes = vec![self.concat(fold)?];
        while self.take('|') {
            nodes.push(self.concat(fold)?);
        }
        self.depth -= 1;
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Alternation(nodes) })
    }

    fn concat(&mut self, fold: bool) -> Result<Node, String> {
        let mut nodes = Vec::new();
        let mut last_letter = None;
        while let Some(&c) = self.rest.peek() {
            if c == '|' || c == ')' {
                break;
            }
            if fold {
                if let Some(last) = last_letter.filter(|_| c.is_ascii_alphabetic()) {
                    let pair: String = [last, c.to_ascii_lowercase()].iter().collect();
                    if FOLDED_PAIRS.contains(&pair.as_str()) {
                        return Err(format!("{pair:?} inside (?i:...)"));
                    }
                }
                last_letter = c.is_ascii_alphabetic().then(|| c.to_ascii_lowercase());
            }
            let atom = self.atom(fold)?;
            nodes.push(self.quantified(atom)?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Concat(nodes) })
    }

    fn atom(&mut self, fold: bool) -> Result<Node, String> {
        let c = self.rest.next().expect("the caller has seen it");
        let class = match c {
            '(' => return self.group(fold),
            '[' => self.set(fold)?,
            '\\' => match self.escape(fold)? {
                Escape::Char(c) => single(c),
                Escape::Class(class) => class,
                Escape::End => return Ok(Node::End),
            },
            '.' => negated(single('\n')),
            '$' if self.dialect == Dialect::Fancy => return Ok(Node::End),
            '^' | '$' => return Err(format!("the anchor {c}")),
            '*' | '+' | '?' | '{' | '}' | ']' => return Err(format!("a {c} that is not escaped")),
            c => single(c),
        };
        Ok(Node::Class(if fold { folded(class)? } else { class }))
    }

    fn group(&mut self, fold: bool) -> Result<Node, String> {
        let mut inner_fold = fold;
        let mut look_ahead = None;
        if self.looks_at("?") {
            let kinds = [("?:", None), ("?i:", None), ("?!", Some(true)), ("?=", Some(false))];
            let Some((mark, look)) = kinds.into_iter().find(|(mark, _)| self.looks_at(mark)) else {
                let mark: String = self.rest.clone().take(3).collect();
                return Err(format!("the group ({mark}"));
            };
            for _ in mark.chars() {
                self.rest.next();
            }
            inner_fold |= mark == "?i:";
            look_ahead = look;
        }
        let node = self.alternation(inner_fold)?;
        if !self.take(')') {
            return Err("an unmatched (".into());
        }
        match (look_ahead, node) {
            (None, node) => Ok(node),
            (Some(negated), Node::Class(class)) => Ok(Node::LookAhead { negated, class }),
            (Some(_), _) => Err("a look-ahead at anything but one character".into()),
        }
    }

    fn quantified(&mut self, node: Node) -> Result<Node, String> {
        let Some(&c) = self.rest.peek() else { return Ok(node) };
        let (min, max, interval) = match c {
            '*' => (0, None, false),
            '+' => (1, None, false),
            '?' => (0, Some(1), false),
            '{' => {
                let (min, max) = self.interval()?;
                (min, max, true)
            }
            _ => return Ok(node),
        };
        if !interval {
            self.rest.next();
        }
        if matches!(node, Node::LookAhead { .. } | Node::End) {
            return Err(format!("the quantifier {c} behind a look-ahead or an end"));
        }
        let possessive = self.take('+');
        if possessive && interval && self.dialect == Dialect::Oniguruma {
            return Err("the quantifier {...}+".into());
        }
        if self.looks_at("?") {
            return Err(format!("the lazy quantifier {c}?"));
        }
        if self.looks_at("*") || self.looks_at("+") || self.looks_at("{") {
            return Err("a quantifier behind a quantifier".into());
        }
        Ok(Node::Repeat { node: Box::new(node), min, max, possessive })
    }

    /// `{n}`, `{n,}` or `{n,m}`.
    fn interval(&mut self) -> Result<(u32, Option<u32>), String> {
        let text: String = self.rest.by_ref().take_while(|&c| c != '}').skip(1).collect();
        let refused = || format!("the quantifier {{{text}}}");
        let number = |digits: &str| {
            let value = digits.parse::<u32>().ok().filter(|&value| value <= MAX_REPEATS);
            value.filter(|_| digits.bytes().all(|b| b.is_ascii_digit())).ok_or_else(refused)
        };
        let (min, max) = match text.split_once(',') {
            None => (number(&text)?, Some(number(&text)?)),
            Some((min, "")) => (number(min)?, None),
            Some((min, max)) => (number(min)?, Some(number(max)?)),
        };
        if max.is_some_and(|max| max < min || max == 0) { Err(refused()) } else { Ok((min, max)) }
    }

    fn escape(&mut self, fold: bool) -> Result<Escape, String> {
        let Some(c) = self.rest.next() else { return Err(r"a \ at the end".into()) };
        let class = match c {
            'n' => return Ok(Escape::Char('\n')),
            'r' => return Ok(Escape::Char('\r')),
            't' => return Ok(Escape::Char('\t')),
            'f' => return Ok(Escape::Char('\u{C}')),
            'v' => return Ok(Escape::Char('\u{B}')),
            'z' => return Ok(Escape::End),
            'x' | 'u' => return Ok(Escape::Char(self.code_point(c)?)),
            's' => unicode::space(),
            'S' => negated(unicode::space()),
            'd' => unicode::property("Nd").expect("a general category"),
            'D' => negated(unicode::property("Nd").expect("a general category")),
            'p' | 'P' => self.property(c)?,
            c if c.is_ascii_alphanumeric() => return Err(format!(r"the escape \{c}")),
            c => return Ok(Escape::Char(c)),
        };
        if fold { Err(format!(r"\{c} inside (?i:...)")) } else { Ok(Escape::Class(class)) }
    }

    fn property(&mut self, letter: char) -> Result<ClassUnicode, String> {
        let mut name = String::new();
        if self.take('{') {
            name.extend(self.rest.by_ref().take_while(|&c| c != '}'));
        }
        let caret = name.starts_with('^');
        let class = unicode::property(name.trim_start_matches('^'))
            .ok_or_else(|| format!(r"the property \{letter}{{{name}}}"))?;
        Ok(if caret == (letter == 'P') { class } else { negated(class) })
    }

    /// `\xHH`, `\x{H...}` or `\uHHHH`.
    fn code_point(&mut self, letter: char) -> Result<char, String> {
        let digits: String = if letter == 'x' && self.take('{') {
            self.rest.by_ref().take_while(|&c| c != '}').collect()
        } else {
            let count = if letter == 'x' { 2 } else { 4 };
            self.rest.by_ref().take(count).collect()
        };
        // Above 0x7F, \xHH is a byte in one dialect and a character in the other.
        u32::from_str_radix(&digits, 16)
            .ok()
            .filter(|&value| letter == 'u' || digits.len() > 2 || value < 0x80)
            .and_then(char::from_u32)
            .ok_or_else(|| format!(r"the escape \{letter}{digits}"))
    }

    /// What stands between [ and ].
    fn set(&mut self, fold: bool) -> Result<ClassUnicode, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("a pattern nested more than {MAX_DEPTH} deep"));
        }
        let is_negated = self.take('^');
        if is_negated && fold {
            return Err("[^...] inside (?i:...)".into());
        }
        let mut class = ClassUnicode::empty();
        let mut first = true;
        loop {
            if let Some(operator) = ["&&", "--", "~~", "[:"].into_iter().find(|op| self.looks_at(op)) {
                return Err(format!("{operator} inside [...]"));
            }
            let low = match self.rest.next() {
                None => return Err("an unmatched [".into()),
                Some(']') if first => return Err("a ] that is not escaped".into()),
                Some(']') => break,
                Some('[') => {
                    class.union(&self.set(fold)?);
                    first = false;
                    continue;
                }
                Some('\\') => match self.escape(fold)? {
                    Escape::Char(c) => c,
                    Escape::Class(inner) => {
                        class.union(&inner);
                        first = false;
                        continue;
                    }
                    Escape::End => return Err(r"the escape \z inside [...]".into()),
                },
                Some(c) => c,
            };
            first = false;
            let is_range = self.looks_at("-") && !self.looks_at("-]");
            if !is_range {
                class.push(ClassUnicodeRange::new(low, low));
                continue;
            }
            self.rest.next();
            let high = match self.rest.next() {
                Some('\\') => match self.escape(fold)? {
                    Escape::Char(c) => c,
                    _ => return Err("a range that ends in a class".into()),
                },
                Some('[') | None => return Err("a range that ends in a class".into()),
                Some(c) => c,
            };
            if low > high {
                return Err(format!("the range {low}-{high}"));
            }
            class.push(ClassUnicodeRange::new(low, high));
        }
        self.depth -= 1;
        Ok(if is_negated { negated(class) } else { class })
    }
}

enum Escape {
    Char(char),
    Class(ClassUnicode),
    End,
}

fn single(c: char) -> ClassUnicode {
    ClassUnicode::new([ClassUnicodeRange::new(c, c)])
}

fn negated(mut class: ClassUnicode) -> ClassUnicode {
    class.negate();
    class
}

/// The class with the other case of its letters, for ASCII letters alone: beyond them the dialects' foldings differ.
fn folded(mut class: ClassUnicode) -> Result<ClassUnicode, String> {
    if class.iter().any(|range| !range.end().is_ascii()) {
        return Err("a character beyond ASCII inside (?i:...)".into());
    }
    class.try_case_fold_simple().map_err(|error| error.to_string())?;
    Ok(class)
}
