//! Saved form of the wires.

/// Routes and levels.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GsiStateV1 {
    /// ISA interrupt of PIRQ A-H; 0 or missing: none.
    #[prost(uint32, repeated, tag = "1")]
    pub pirq_routes: Vec<u32>,
    /// Level of each input in the order of creation; missing ones are low.
    #[prost(bool, repeated, tag = "2")]
    pub high_inputs: Vec<bool>,
}
