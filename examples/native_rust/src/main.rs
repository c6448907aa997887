// SPDX-License-Identifier: Apache-2.0
//! A server of lines in Rust: `lines PORT`. `RUSTFLAGS="$(kcov-bridge native --rust)" cargo build`
//! builds it so that a guest's kcov shows its blocks; `native_rust_target.py` starts it as a target.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};

#[inline(never)]
fn add(words: &str) -> Option<i64> {
    let (left, right) = words.split_once(' ')?;
    left.parse::<i64>().ok()?.checked_add(right.parse().ok()?)
}

#[inline(never)]
fn answer(line: &str) -> String {
    match line.split_once(' ') {
        Some(("add", words)) => add(words).map_or("error".into(), |sum| sum.to_string()),
        Some(("upper", words)) => words.to_uppercase(),
        _ => "error".into(),
    }
}

fn converse(mut connection: TcpStream) -> std::io::Result<()> {
    let lines = BufReader::new(connection.try_clone()?).lines();
    for line in lines {
        writeln!(connection, "{}", answer(&line?))?;
    }
    Ok(())
}

fn main() -> std::io::Result<()> {
    let port = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0u16);
    for connection in TcpListener::bind(("127.0.0.1", port))?.incoming() {
        // A client that goes away ends only its own conversation.
        let _ = converse(connection?);
    }
    Ok(())
}
