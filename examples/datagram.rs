//! Sends a datagram, or prints those that arrive. `./dev demo` uses it.
//!
//!     datagram send FROM TO TEXT
//!     datagram receive NAME ADDRESS:PORT...

use std::net::UdpSocket;
use std::process::ExitCode;
use std::{env, io, thread};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["send", from, to, text] => send(from, to, text),
        ["receive", name, ref addresses @ ..] => receive(name, addresses),
        _ => Err(io::Error::other("usage: datagram send FROM TO TEXT | receive NAME ADDRESS...")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("datagram {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn send(from: &str, to: &str, text: &str) -> io::Result<()> {
    UdpSocket::bind(from)?.send_to(text.as_bytes(), to).map(drop)
}

/// A line when all sockets are open, and then one for each datagram.
fn receive(name: &str, addresses: &[&str]) -> io::Result<()> {
    let sockets = addresses.iter().map(UdpSocket::bind).collect::<io::Result<Vec<_>>>()?;
    println!("{name} listens");
    thread::scope(|scope| {
        let threads: Vec<_> =
            sockets.iter().map(|socket| scope.spawn(move || show(name, socket))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })
}

fn show(name: &str, socket: &UdpSocket) -> io::Result<()> {
    let here = socket.local_addr()?;
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..length]);
        println!("{name} got \"{text}\" on {here} from {from}");
    }
}
