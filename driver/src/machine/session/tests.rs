//! Sessions with agents that misbehave.

use firn_guest_agent::protocol::{
    Decoder, Frame, Greeting, GreetingKind, Item, Ready, ToAgent, ToHost, encode,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use std::os::unix::net::UnixStream;

use super::agent::cloned;
use super::*;
use firn_agent_client::Clock;
use firn_agent_client::{HEARTBEAT, SILENCE};

/// An agent that greets, is ready, and then says nothing any more.
async fn mute_agent(stream: UnixStream) {
    let mut stream = cloned(&stream).expect("a socket");
    greet(&mut stream).await;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.expect("the host leaves");
}

/// Answers the host's hello.
async fn greet(stream: &mut tokio::net::UnixStream) {
    let mut decoder = Decoder::new();
    let hello = loop {
        if let Some(hello) = decoder.find_greeting() {
            break hello;
        }
        let byte = stream.read_u8().await.expect("the host says hello");
        decoder.push(&[byte]);
    };
    let welcome = Greeting::new(GreetingKind::Welcome, hello.nonce);
    let ready = ToHost::Ready(Ready {
        agent_version: String::new(),
        init: true,
        early: false,
        hostname: String::new(),
        kernel: String::new(),
        uptime_ms: 1,
        boot: None,
        warnings: vec!["no clock".to_owned()],
    });
    let mut bytes = welcome.to_bytes().to_vec();
    encode(&Frame { id: 0, message: ready }, &mut bytes).expect("it is short");
    stream.write_all(&bytes).await.expect("the host is there");
}

#[tokio::test]
async fn an_agent_that_is_started_again_is_met_again() {
    let (host, guest) = UnixStream::pair().expect("sockets");
    let agent = tokio::spawn(async move {
        let mut stream = cloned(&guest).expect("a socket");
        for _ in 0..3 {
            greet(&mut stream).await;
            stream.write_all(&[0xff; 100]).await.expect("the host is there");
        }
    });
    for again in [false, true, true] {
        let session = AgentSession::connect(&host, again, None, &Clock::new())
            .await
            .expect("the agent greets");
        let lost = session.lost().await;
        assert!(lost.lost() && !lost.is_final(), "{lost}");
    }
    agent.await.expect("no panic");
}

#[tokio::test(start_paused = true)]
async fn a_frozen_guest_is_noticed() {
    let (host, guest) = UnixStream::pair().expect("sockets");
    let agent = tokio::spawn(mute_agent(guest));
    let clock = Clock::new();
    let session =
        AgentSession::connect(&host, false, None, &clock).await.expect("the agent greets");
    assert_eq!(session.warnings(), ["no clock"]);
    let began = tokio::time::Instant::now();
    let command = Command { script: "true".to_owned(), timeout: None };
    let error = session.run(command, HEARTBEAT, || {}).await.expect_err("it is mute");
    assert!(
        matches!(error, SessionError::Agent(AgentError::Lost(Lost::Silent)))
            && error.lost()
            && !error.is_final()
    );
    assert_eq!(began.elapsed().as_secs(), SILENCE.as_secs());
    drop((session, host));
    agent.await.expect("no panic");
}

#[tokio::test]
async fn an_agent_is_not_asked_for_an_environment_that_is_known() {
    let (host, guest) = UnixStream::pair().expect("sockets");
    let agent = tokio::spawn(async move {
        let mut stream = cloned(&guest).expect("a socket");
        greet(&mut stream).await;
        let mut decoder = Decoder::new();
        loop {
            match decoder.next_item::<ToAgent>().expect("frames") {
                Some(Item::Frame(Frame { message: ToAgent::Heartbeat { .. }, .. })) => {}
                Some(Item::Frame(Frame { message: ToAgent::Exec(request), .. })) => {
                    break request.env;
                }
                Some(other) => panic!("{other:?}"),
                None => decoder.push(&[stream.read_u8().await.expect("the host is there")]),
            }
        }
    });
    let environment = vec![("LANG".to_owned(), "C".to_owned())];
    let session = AgentSession::connect(&host, true, Some(environment.clone()), &Clock::new())
        .await
        .expect("the agent greets");
    assert_eq!(session.environment().as_ref(), Some(&environment));
    let command = Command { script: "true".to_owned(), timeout: None };
    session.run(command, HEARTBEAT, || {}).await.expect_err("the agent leaves");
    assert_eq!(agent.await.expect("no panic"), environment);
}

#[tokio::test]
async fn an_agent_that_goes_ends_calls_at_once() {
    let (host, guest) = UnixStream::pair().expect("sockets");
    let agent = tokio::spawn(mute_agent(guest));
    let clock = Clock::new();
    let session =
        AgentSession::connect(&host, false, None, &clock).await.expect("the agent greets");
    let command = Command { script: "true".to_owned(), timeout: None };
    let run = session.run(command, HEARTBEAT, || {});
    let gone = async {
        tokio::task::yield_now().await;
        agent.abort();
    };
    let (answer, ()) = tokio::join!(run, gone);
    let error = answer.expect_err("the agent is gone");
    assert!(error.lost() && error.is_final(), "{error}");
}
