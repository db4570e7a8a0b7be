//! firn-guest-agent
