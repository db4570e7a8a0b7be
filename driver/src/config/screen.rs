//! A machine's screen, keyboard and tablet, as described in files.

use std::fmt;

use firn_vmm::spec::{ScreenKind, ScreenSpec, ValueError};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The screen in a machine's description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScreenChoice {
    /// Not set: it has one if the test's script needs it.
    #[default]
    Unsaid,
    /// None, whatever the script calls.
    No,
    /// This one.
    Yes(ScreenSpec),
}

impl ScreenChoice {
    /// The screen, if there is one.
    #[must_use]
    pub fn spec(self) -> Option<ScreenSpec> {
        match self {
            Self::Yes(spec) => Some(spec),
            Self::Unsaid | Self::No => None,
        }
    }

    /// Falls back to another choice if this one is not set.
    #[must_use]
    pub(super) fn or(self, other: Self) -> Self {
        if self == Self::Unsaid { other } else { self }
    }
}

/// The parts that a test's script needs a machine to have, unless the machine's description sets them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// A screen: a plain one.
    pub screen: bool,
    /// A keyboard.
    pub keyboard: bool,
    /// A tablet.
    pub tablet: bool,
}

impl Needs {
    /// All parts, for interactive use.
    pub const ALL: Self = Self { screen: true, keyboard: true, tablet: true };
}

impl<'de> Deserialize<'de> for ScreenChoice {
    /// Parses `"plain"`, `"gpu"`, `true`, `false`, or the screen's keys.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Wanted;

        impl<'de> Visitor<'de> for Wanted {
            type Value = ScreenChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "\"plain\", \"gpu\", false, or a table with `kind`, `width` and `height`",
                )
            }

            fn visit_bool<E>(self, wanted: bool) -> Result<Self::Value, E> {
                let plain = ScreenChoice::Yes(ScreenSpec::default());
                Ok(if wanted { plain } else { ScreenChoice::No })
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
                let kind = match name {
                    "plain" => ScreenKind::Plain,
                    "gpu" => ScreenKind::Gpu,
                    _ => {
                        let error = ValueError::new(
                            format_args!("{name:?}"),
                            "\"plain\", a frame buffer that every kernel draws on; \"gpu\", a virtio graphics card; false",
                        );
                        return Err(E::custom(error));
                    }
                };
                Ok(ScreenChoice::Yes(ScreenSpec { kind, ..ScreenSpec::default() }))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let spec = ScreenSpec::deserialize(MapAccessDeserializer::new(map))?;
                Ok(ScreenChoice::Yes(spec))
            }
        }

        deserializer.deserialize_any(Wanted)
    }
}
