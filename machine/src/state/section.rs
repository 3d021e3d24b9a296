//! How a part of the machine is saved and restored.

use prost::Message;

/// Why a part of the machine refuses a saved state.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum RestoreError {
    /// The payload is not the message that it should be.
    #[error("malformed: {0}")]
    Malformed(String),
    /// A field holds what the part could never hold.
    #[error("field {field}: {why}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl RestoreError {
    /// A field that holds what the part could never hold.
    pub fn invalid(field: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { field, why: why.into() }
    }
}

impl From<crate::backend::StateError> for RestoreError {
    fn from(error: crate::backend::StateError) -> Self {
        match error {
            crate::backend::StateError::Invalid { field, why } => Self::Invalid { field, why },
        }
    }
}

/// A part of the machine with state: implemented by every device, next to its `saved_state.rs`.
///
/// Both methods take `&self` because devices lock their own state; both are called only while no vCPU runs and
/// no I/O is in flight.
pub trait SaveState: Send + Sync {
    /// What is written: a message with explicit field numbers whose scalars are all optional.
    type Saved: Message + Default;

    /// Version of the section; see [`super::SectionInfo::version`].
    const VERSION: u32 = 1;

    /// Names of the features that [`SaveState::restore`] understands.
    const KNOWN_FEATURES: &'static [&'static str] = &[];

    /// The whole state.
    fn save(&self) -> Self::Saved;

    /// Features in use in `saved` without which a reader would misread it. Most parts have none.
    fn required_features(&self, saved: &Self::Saved) -> Vec<&'static str> {
        let _ = saved;
        Vec::new()
    }

    /// Replaces the whole state. Checks everything first: on an error nothing has changed.
    fn restore(&self, saved: Self::Saved) -> Result<(), RestoreError>;
}

/// [`SaveState`] without its type: what the machine keeps a list of.
pub trait StateSection: Send + Sync {
    /// Version that [`StateSection::save_section`] writes and highest that can be restored.
    fn section_version(&self) -> u32;
    /// Names of the features that can be restored.
    fn known_features(&self) -> &'static [&'static str];
    /// The encoded state and the features it requires.
    fn save_section(&self) -> (Vec<u8>, Vec<&'static str>);
    /// Whether `payload` can be decoded at all: called for every section before any is restored.
    fn check_section(&self, payload: &[u8]) -> Result<(), RestoreError>;
    /// Replaces the state.
    fn restore_section(&self, payload: &[u8]) -> Result<(), RestoreError>;
}

impl<T: SaveState> StateSection for T {
    fn section_version(&self) -> u32 {
        T::VERSION
    }

    fn known_features(&self) -> &'static [&'static str] {
        T::KNOWN_FEATURES
    }

    fn save_section(&self) -> (Vec<u8>, Vec<&'static str>) {
        let saved = self.save();
        let features = self.required_features(&saved);
        (saved.encode_to_vec(), features)
    }

    fn check_section(&self, payload: &[u8]) -> Result<(), RestoreError> {
        decode::<T::Saved>(payload).map(drop)
    }

    fn restore_section(&self, payload: &[u8]) -> Result<(), RestoreError> {
        self.restore(decode(payload)?)
    }
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, RestoreError> {
    M::decode(payload).map_err(|e| RestoreError::Malformed(e.to_string()))
}
