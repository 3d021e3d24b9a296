//! Tests of [`super`]: damage is always noticed, and older and newer read each other as the table says.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

#[derive(Clone, PartialEq, prost::Message)]
struct TimerV1 {
    /// Default: 0.
    #[prost(uint64, optional, tag = "1")]
    ticks: Option<u64>,
    /// Default: false.
    #[prost(bool, optional, tag = "2")]
    wide: Option<bool>,
}

#[derive(Default)]
struct Timer(Mutex<(u64, bool)>);

impl SaveState for Timer {
    type Saved = TimerV1;
    const KNOWN_FEATURES: &'static [&'static str] = &["wide"];

    fn save(&self) -> TimerV1 {
        let (ticks, wide) = *self.0.lock().unwrap();
        TimerV1 { ticks: Some(ticks), wide: Some(wide) }
    }
    fn required_features(&self, saved: &TimerV1) -> Vec<&'static str> {
        if saved.wide == Some(true) { vec!["wide"] } else { vec![] }
    }
    fn restore(&self, saved: TimerV1) -> Result<(), RestoreError> {
        let ticks = saved.ticks.unwrap_or(0);
        if ticks > 1 << 40 {
            return Err(RestoreError::invalid("ticks", "more than 40 bits"));
        }
        *self.0.lock().unwrap() = (ticks, saved.wide.unwrap_or(false));
        Ok(())
    }
}

/// A timer of an older version, which knows no features.
#[derive(Default)]
struct OldTimer(Timer);

impl SaveState for OldTimer {
    type Saved = TimerV1;
    fn save(&self) -> TimerV1 {
        self.0.save()
    }
    fn restore(&self, saved: TimerV1) -> Result<(), RestoreError> {
        self.0.restore(saved)
    }
}

fn timer(ticks: u64, wide: bool) -> Timer {
    Timer(Mutex::new((ticks, wide)))
}

fn state(timer: &Timer) -> (u64, bool) {
    *timer.0.lock().unwrap()
}

fn written(writer: &StateWriter) -> Vec<u8> {
    let mut bytes = Vec::new();
    writer.write_to(&mut bytes).unwrap();
    bytes
}

fn small() -> Vec<u8> {
    let mut writer = StateWriter::new("atoll-1", "0.1.0");
    writer.save("timer/0", &timer(7, true), true);
    writer.save("timer/1", &timer(9, false), false);
    writer.add("empty", 1, false, &[], Vec::new());
    written(&writer)
}

/// Reads everything; the machine has both timers.
fn read(bytes: &[u8]) -> Result<RestoreReport, ContainerError> {
    let (a, b) = (Timer::default(), Timer::default());
    StateReader::new(bytes)?.restore(&[("timer/0", &a), ("timer/1", &b)])
}

#[test]
fn a_machine_comes_back_and_the_report_names_what_was_left_alone() {
    let (a, b, c) = (Timer::default(), Timer::default(), timer(1, false));
    let bytes = small();
    let reader = StateReader::new(&*bytes).unwrap();
    assert_eq!(reader.header().machine, "atoll-1");
    assert_eq!(reader.header().guest_arch, ARCH_X86_64);
    assert_eq!(reader.header().product_version, "0.1.0");
    assert_eq!(reader.header().sections[0].required_features, ["wide"]);
    assert!(reader.header().sections[1].required_features.is_empty(), "only for state in use");
    let report = reader.restore(&[("timer/0", &a), ("timer/1", &b), ("timer/2", &c)]).unwrap();
    assert_eq!((state(&a), state(&b), state(&c)), ((7, true), (9, false), (1, false)));
    assert_eq!(report, RestoreReport { ignored: vec!["empty".into()], absent: vec!["timer/2".into()] });
}

#[test]
fn the_header_is_read_without_any_payload() {
    let bytes = small();
    let payloads: u64 = StateReader::new(&*bytes).unwrap().header().sections.iter().map(|s| s.length).sum();
    let header = &bytes[..bytes.len() - payloads as usize];
    assert_eq!(StateReader::new(header).unwrap().header().sections.len(), 3);
}

#[test]
fn every_single_bit_flip_is_noticed() {
    let good = small();
    assert!(read(&good).is_ok());
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn every_truncation_and_every_addition_is_noticed() {
    let good = small();
    for length in 0..good.len() {
        let error = read(&good[..length]).unwrap_err();
        assert!(matches!(error, ContainerError::Truncated(_)), "{length}: {error}");
    }
    let mut longer = good;
    longer.push(0);
    assert!(matches!(read(&longer), Err(ContainerError::Trailing)));
}

#[test]
fn damage_is_reported_with_the_sections_name_and_nothing_is_restored() {
    let mut bytes = small();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let (a, b) = (timer(1, false), timer(2, false));
    let error = StateReader::new(&*bytes).unwrap().restore(&[("timer/0", &a), ("timer/1", &b)]).unwrap_err();
    assert_eq!(error.to_string(), "saved machine is damaged: checksum of section timer/1 does not match");
    assert_eq!((state(&a), state(&b)), ((1, false), (2, false)));
}

#[test]
fn unknown_features_versions_and_required_sections_are_refused_by_name() {
    let bytes = small();
    let old = OldTimer::default();
    let error = StateReader::new(&*bytes).unwrap().restore(&[("timer/0", &old)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "section timer/0 uses wide, which this version of atoll does not know; use a newer one"
    );
    let error = StateReader::new(&*bytes).unwrap().restore(&[]).unwrap_err();
    assert!(matches!(error, ContainerError::UnknownSection(name) if name == "timer/0"));
    let mut writer = StateWriter::new("atoll-1", "9");
    writer.add("timer/0", 2, false, &[], Vec::new());
    let error = read(&written(&writer)).unwrap_err();
    assert!(matches!(error, ContainerError::SectionVersion { found: 2, known: 1, .. }), "{error}");
}

#[test]
fn a_part_that_refuses_its_state_is_named() {
    let mut writer = StateWriter::new("atoll-1", "1");
    writer.add_message("timer/0", &TimerV1 { ticks: Some(1 << 50), wide: None });
    assert_eq!(
        read(&written(&writer)).unwrap_err().to_string(),
        "section timer/0: field ticks: more than 40 bits"
    );
    let mut writer = StateWriter::new("atoll-1", "1");
    writer.add("timer/0", 1, true, &[], vec![0xff; 3]);
    let text = read(&written(&writer)).unwrap_err().to_string();
    assert!(text.starts_with("section timer/0: malformed: "), "{text}");
}

#[test]
fn missing_fields_have_their_defaults() {
    let mut writer = StateWriter::new("atoll-1", "1");
    writer.add("timer/0", 1, true, &[], Vec::new());
    let part = timer(5, true);
    StateReader::new(&*written(&writer)).unwrap().restore(&[("timer/0", &part)]).unwrap();
    assert_eq!(state(&part), (0, false));
}

#[test]
fn limits_hold_for_writer_and_reader() {
    let mut writer = StateWriter::new("atoll-1", "1");
    writer.add("x", 1, true, &[], Vec::new());
    writer.add("x", 1, true, &[], Vec::new());
    assert!(matches!(writer.write_to(&mut Vec::new()), Err(ContainerError::Duplicate(_))));
    let mut writer = StateWriter::new("atoll-1", "1");
    writer.add(&"x".repeat(MAX_NAME + 1), 1, true, &[], Vec::new());
    assert!(matches!(writer.write_to(&mut Vec::new()), Err(ContainerError::TooLarge { .. })));
    assert!(matches!(read(b"ELF\x7f0000"), Err(ContainerError::Magic)));
    // A header length of 4 GiB is refused before anything is allocated.
    let mut bytes = small();
    bytes[12..16].fill(0xff);
    assert!(matches!(read(&bytes), Err(ContainerError::TooLarge { .. })));
    let mut bytes = small();
    bytes[8] = 2;
    assert!(matches!(read(&bytes), Err(ContainerError::Version { found: 2 })));
}

/// A section that claims the most it may costs no more memory than the bytes that are really there.
#[test]
fn a_false_length_allocates_nothing() {
    let mut header = Header { guest_arch: "x".into(), machine: "y".into(), ..Header::default() };
    let section = SectionInfo { name: "big".into(), length: MAX_SECTION, ..SectionInfo::default() };
    header.sections.push(section);
    let bytes = framed(&header);
    let error = StateReader::new(&*bytes).unwrap().next_section().unwrap_err();
    assert_eq!(error.to_string(), "saved machine is cut off in section big");
    header.sections[0].length = MAX_SECTION + 1;
    assert!(matches!(StateReader::new(&*framed(&header)), Err(ContainerError::TooLarge { .. })));
}

fn framed(header: &Header) -> Vec<u8> {
    let header = prost::Message::encode_to_vec(&saved_state::HeaderV1::from(header));
    let mut bytes = MAGIC.to_vec();
    bytes.extend(CONTAINER_VERSION.to_le_bytes());
    bytes.extend((header.len() as u32).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes);
    crc.update(&header);
    bytes.extend(crc.finalize().to_le_bytes());
    bytes.extend(header);
    bytes
}

proptest! {
    #[test]
    fn any_sections_come_back_as_written(
        sections in prop::collection::btree_map(
            "[a-z/0-9]{1,20}",
            (any::<u32>(), any::<bool>(), prop::collection::vec("[a-z]{1,9}", 0..4), prop::collection::vec(any::<u8>(), 0..300)),
            0..12,
        )
    ) {
        let mut writer = StateWriter::new("atoll-1", "0.1");
        for (name, (version, required, features, payload)) in &sections {
            let features: Vec<&str> = features.iter().map(String::as_str).collect();
            writer.add(name, *version, *required, &features, payload.clone());
        }
        let bytes = written(&writer);
        let mut reader = StateReader::new(&*bytes).unwrap();
        for (name, (version, required, features, payload)) in &sections {
            let section = reader.next_section().unwrap().unwrap();
            prop_assert_eq!(&section.info.name, name);
            prop_assert_eq!(section.info.version, *version);
            prop_assert_eq!(section.info.required, *required);
            prop_assert_eq!(&section.info.required_features, features);
            prop_assert_eq!(&section.payload, payload);
        }
        prop_assert_eq!(reader.next_section().unwrap(), None);
    }

    #[test]
    fn garbage_is_refused_without_a_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..400),
        cut in any::<bool>(),
    ) {
        if cut && bytes.len() > 20 {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
            let length = bytes.len() as u32 - 20;
            bytes[12..16].copy_from_slice(&length.to_le_bytes());
            let mut crc = crc32fast::Hasher::new();
            crc.update(&bytes[..16]);
            crc.update(&bytes[20..]);
            let crc = crc.finalize().to_le_bytes();
            bytes[16..20].copy_from_slice(&crc);
        }
        let _ = read(&bytes);
    }
}
