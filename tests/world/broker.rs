//! A client of NATS that sends what no library would: the bytes of a message as a test writes them.
//! <https://docs.nats.io/reference/reference-protocols/nats-protocol>

use std::collections::VecDeque;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use crate::PATIENCE;

/// A connection that publishes and subscribes without a client library.
pub struct RawClient {
    socket: BufReader<TcpStream>,
    /// Messages that came while the client waited for an answer.
    received: VecDeque<RawMessage>,
}

/// A message as it came over the connection.
#[derive(Debug, Clone)]
pub struct RawMessage {
    /// The subject.
    pub subject: String,
    /// The reply subject, if the message has one.
    pub reply: Option<String>,
    /// The header block; empty without headers.
    pub headers: Vec<u8>,
    /// The body.
    pub body: Vec<u8>,
}

impl RawClient {
    /// Connects to the server on that port of this machine, without a login.
    pub async fn connect(port: u16) -> RawClient {
        RawClient::with_options(port, r#"{"verbose":false,"headers":true,"no_responders":true}"#).await
    }

    /// Connects, and sends these options in `CONNECT`.
    pub async fn with_options(port: u16, options: &str) -> RawClient {
        let mut socket = BufReader::new(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        let mut info = String::new();
        socket.read_line(&mut info).await.unwrap();
        assert!(info.starts_with("INFO "), "{info}");
        let mut client = RawClient { socket, received: VecDeque::new() };
        client.send(format!("CONNECT {options}\r\n").as_bytes()).await;
        client
    }

    /// The server's answer to a client that has just connected: `PONG`, or a refusal.
    pub async fn login_answer(&mut self) -> String {
        self.send(b"PING\r\n").await;
        let mut line = String::new();
        tokio::time::timeout(PATIENCE, self.socket.read_line(&mut line)).await.expect("an answer").unwrap();
        line.trim_end().to_owned()
    }

    /// Sends bytes of the protocol.
    pub async fn send(&mut self, bytes: &[u8]) {
        self.socket.get_mut().write_all(bytes).await.unwrap();
    }

    /// Publishes a message. An empty header block makes it one without headers.
    pub async fn publish(&mut self, subject: impl AsRef<[u8]>, headers: &[u8], body: &[u8]) {
        let subject = subject.as_ref();
        let sizes = match headers.len() {
            0 => format!(" {}\r\n", body.len()),
            length => format!(" {length} {}\r\n", length + body.len()),
        };
        let verb: &[u8] = if headers.is_empty() { b"PUB " } else { b"HPUB " };
        self.send(&[verb, subject, sizes.as_bytes(), headers, body, b"\r\n"].concat()).await;
    }

    /// Waits until the server has taken all that was sent.
    ///
    /// # Panics
    /// When the server refuses any of it, or says nothing for a minute.
    pub async fn flush(&mut self) {
        self.send(b"PING\r\n").await;
        let answered = async {
            while let Some(message) = self.receive().await {
                self.received.push_back(message);
            }
        };
        tokio::time::timeout(PATIENCE, answered).await.expect("an answer within a minute");
    }

    /// Subscribes to a subject, which may have wildcards.
    pub async fn subscribe(&mut self, subject: &str) {
        self.send(format!("SUB {subject} 1\r\n").as_bytes()).await;
        self.flush().await;
    }

    /// Waits for the next message.
    ///
    /// # Panics
    /// When none comes for a minute.
    pub async fn next(&mut self) -> RawMessage {
        if let Some(message) = self.received.pop_front() {
            return message;
        }
        let next = tokio::time::timeout(PATIENCE, self.receive()).await.expect("a message within a minute");
        next.expect("nothing asks for a PONG here")
    }

    /// The next message, or none for a PONG.
    async fn receive(&mut self) -> Option<RawMessage> {
        loop {
            let mut line = Vec::new();
            self.socket.read_until(b'\n', &mut line).await.unwrap();
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
            let has_headers = match verb {
                "MSG" => false,
                "HMSG" => true,
                "PONG" => return None,
                "PING" => {
                    self.send(b"PONG\r\n").await;
                    continue;
                }
                "INFO" => continue,
                _ => panic!("the server says {line:?}"),
            };
            let mut words: Vec<&str> = rest.split_whitespace().collect();
            let total: usize = words.pop().unwrap().parse().unwrap();
            let headers: usize = if has_headers { words.pop().unwrap().parse().unwrap() } else { 0 };
            let (subject, reply) = (words[0].to_owned(), words.get(2).map(|reply| (*reply).to_owned()));
            let mut bytes = vec![0; total + 2];
            self.socket.read_exact(&mut bytes).await.unwrap();
            bytes.truncate(total);
            let body = bytes.split_off(headers);
            return Some(RawMessage { subject, reply, headers: bytes, body });
        }
    }
}
