//! Tests of the models' tables: exact or refused, and consistent with themselves.

use super::*;
use crate::cpu::msr::index as msr;
use crate::cpu::topology::Topology;

fn host(vendor: Vendor) -> HostCpu {
    HostCpu { vendor, features: FeatureSet::of(Feature::ALL), tsc_khz: None }
}

fn model(name: &str, vendor: Vendor) -> CpuModel {
    CpuModel::resolve(name, &host(vendor), 2_600_000).unwrap()
}

const ONE: Topology = Topology { sockets: 1, cores: 1, threads: 1 };

fn context(topology: &Topology, index: u32) -> CpuidContext<'_> {
    CpuidContext { apic_id: topology.apic_id(index), topology, os_xsave: false, xcr0: 1, apic_enabled: true }
}

fn ask(model: &CpuModel, leaf: u32, subleaf: u32) -> CpuidResult {
    model.cpuid(leaf, subleaf, &context(&ONE, 0))
}

#[test]
fn a_named_model_is_exact_on_every_host_that_can() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        for name in MODEL_NAMES {
            let model = model(name, vendor);
            // What a guest finds in CPUID is precisely the feature set.
            let found = HostCpu::from_cpuid(|leaf, subleaf| {
                model.cpuid(leaf, subleaf, &CpuidContext { os_xsave: true, ..context(&ONE, 0) })
            });
            assert_eq!(found.features, *model.features(), "{name}");
            assert_eq!(found.vendor, vendor);
            assert_eq!(found.tsc_khz, Some(2_600_000));
        }
    }
    let base = model("atoll-base", Vendor::Amd);
    assert!(base.has(Feature::Avx2) && !base.has(Feature::Pcid) && !base.has(Feature::ShaNi));
    let newer = model("atoll-2026", Vendor::Amd);
    assert_eq!(newer.features().difference(*base.features()), ADDED_2026);
}

#[test]
fn a_named_model_is_refused_by_the_names_of_what_is_missing() {
    let mut old = host(Vendor::Intel);
    old.features.remove(Feature::Avx2);
    old.features.remove(Feature::ShaNi);
    // The software CPU brings this itself.
    old.features.remove(Feature::Smap);
    old.features.remove(Feature::Pcid);
    let error = CpuModel::resolve("atoll-2026", &old, 2_000_000).unwrap_err();
    assert_eq!(
        error.to_string(),
        "CPU model atoll-2026 needs avx2, sha_ni, which this host does not have; choose another with --cpu"
    );
    let adapted = CpuModel::resolve("host", &old, 2_000_000).unwrap();
    assert!(!adapted.has(Feature::Avx2) && adapted.has(Feature::Avx) && adapted.has(Feature::Smap));
    let error = CpuModel::resolve("i486", &old, 2_000_000).unwrap_err();
    assert_eq!(error.to_string(), "unknown CPU model i486; known: atoll-base, atoll-2026, host");
    assert!(CpuModel::resolve("atoll-base", &host(Vendor::Amd), 0).is_err());
}

#[test]
fn host_adapts_without_leaving_features_on_air() {
    let mut old = host(Vendor::Amd);
    old.features.remove(Feature::Avx);
    let model = CpuModel::resolve("host", &old, 2_000_000).unwrap();
    for feature in [Feature::Avx2, Feature::Fma, Feature::F16c] {
        assert!(!model.has(feature), "{}", feature.name());
    }
    assert_eq!(model.xcr0_mask(), 3);
    assert_eq!(ask(&model, 0xd, 0).ecx, 576);
    assert_eq!(ask(&model, 0xd, 2), CpuidResult::default());
}

#[cfg(target_arch = "x86_64")]
#[test]
fn this_host_can_be_detected_and_adapted_to() {
    let host = HostCpu::detect();
    let model = CpuModel::resolve("host", &host, 2_000_000).unwrap();
    assert!(model.has(Feature::Sse2));
    assert_eq!(host.features.has(Feature::Avx2), std::arch::is_x86_feature_detected!("avx2"));
    assert_eq!(host.features.has(Feature::ShaNi), std::arch::is_x86_feature_detected!("sha"));
    assert_eq!(host.features.has(Feature::Lzcnt), std::arch::is_x86_feature_detected!("lzcnt"));
}

#[test]
fn vendor_brand_and_widths_are_told() {
    for (vendor, name) in [(Vendor::Intel, "GenuineIntel"), (Vendor::Amd, "AuthenticAMD")] {
        let model = model("atoll-base", vendor);
        let r = ask(&model, 0, 0);
        let id: Vec<u8> = [r.ebx, r.edx, r.ecx].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(id, name.as_bytes());
        let brand: Vec<u8> = (2..5)
            .map(|n| ask(&model, 0x8000_0000 + n, 0))
            .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
            .flat_map(u32::to_le_bytes)
            .collect();
        assert!(brand.starts_with(b"Atoll Base CPU\0"));
        assert_eq!(ask(&model, 0x8000_0008, 0).eax, 40 | 48 << 8);
        assert_eq!(ask(&model, 1, 0).eax, model.signature());
    }
}

#[test]
fn forbidden_features_are_absent() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let model = model("atoll-2026", vendor);
        let (one, seven) = (ask(&model, 1, 0), ask(&model, 7, 0));
        assert_eq!(one.ecx & (1 << 3 | 1 << 5), 0, "MONITOR, VMX");
        assert_eq!(seven.ebx & (1 << 4 | 1 << 11 | 1 << 14 | 1 << 16), 0, "HLE, RTM, MPX, AVX-512");
        assert_eq!(seven.ecx & (1 << 3 | 1 << 7 | 1 << 16), 0, "PKU, CET-SS, LA57");
        assert_eq!(seven.edx & (1 << 20), 0, "CET-IBT");
        assert_eq!(ask(&model, 0xa, 0), CpuidResult::default(), "performance counters");
        assert_eq!(ask(&model, 5, 0), CpuidResult::default(), "MWAIT");
        assert_eq!(ask(&model, 0x8000_0001, 0).ecx & (1 << 2), 0, "SVM");
        assert_eq!(ask(&model, 0xd, 1).eax & (1 << 3), 0, "XSAVES");
    }
}

#[test]
fn leaves_follow_the_state_they_show() {
    let model = model("atoll-base", Vendor::Amd);
    let off = CpuidContext { apic_enabled: false, ..context(&ONE, 0) };
    assert_eq!(model.cpuid(1, 0, &off).edx & 1 << 9, 0);
    assert_eq!(model.cpuid(0x8000_0001, 0, &off).edx & 1 << 9, 0);
    assert_ne!(ask(&model, 1, 0).edx & 1 << 9, 0);
    assert_eq!(ask(&model, 1, 0).ecx & 1 << 27, 0);
    let on = CpuidContext { os_xsave: true, xcr0: 7, ..context(&ONE, 0) };
    assert_ne!(model.cpuid(1, 0, &on).ecx & 1 << 27, 0);
    assert_eq!(model.cpuid(0xd, 0, &on), CpuidResult { eax: 7, ebx: 832, ecx: 832, edx: 0 });
    assert_eq!(ask(&model, 0xd, 0).ebx, 576);
    assert_eq!(ask(&model, 0xd, 2), CpuidResult { eax: 256, ebx: 576, ecx: 0, edx: 0 });
}

#[test]
fn topology_leaves_agree_with_apic_ids() {
    let topology = Topology { sockets: 2, cores: 3, threads: 2 };
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let model = model("atoll-base", vendor);
        for index in 0..topology.cpus() {
            let ctx = context(&topology, index);
            let (smt, core) = (model.cpuid(0xb, 0, &ctx), model.cpuid(0xb, 1, &ctx));
            assert_eq!((smt.ebx, smt.ecx >> 8), (2, 1));
            assert_eq!((core.ebx, core.ecx >> 8), (6, 2));
            assert_eq!(smt.edx, topology.apic_id(index));
            assert_eq!(core.edx >> core.eax, index / 6, "package");
            assert_eq!(core.edx >> smt.eax & 3, index / 2 % 3, "core");
            assert_eq!(model.cpuid(0xb, 2, &ctx).ecx, 2);
            let leaf1 = model.cpuid(1, 0, &ctx);
            assert_eq!(leaf1.ebx >> 24, topology.apic_id(index));
            assert!(leaf1.ebx >> 16 & 0xff >= 6 && leaf1.edx >> 28 & 1 != 0);
        }
        let last = context(&topology, 11);
        if vendor == Vendor::Amd {
            let r = model.cpuid(0x8000_001e, 0, &last);
            assert_eq!((r.ebx & 0xff, r.ebx >> 8 & 0xff, r.ecx & 0xff), (2, 1, 1));
            assert_eq!(model.cpuid(0x8000_0008, 0, &last).ecx, 5 | 3 << 12);
        } else {
            assert_eq!(model.cpuid(4, 0, &last).eax >> 14 & 0xfff, 1);
            assert_eq!(model.cpuid(4, 3, &last).eax >> 14 & 0xfff, 7);
            assert_eq!(model.cpuid(4, 3, &last).eax >> 26, 3);
        }
    }
    // One processor: no HTT bit.
    assert_eq!(ask(&model("atoll-base", Vendor::Intel), 1, 0).edx >> 28 & 1, 0);
}

#[test]
fn cache_sizes_are_what_ways_and_sets_multiply_to() {
    for (vendor, leaf, sizes) in
        [(Vendor::Intel, 4, [48, 32, 2048, 32768]), (Vendor::Amd, 0x8000_001d, [32, 32, 1024, 32768])]
    {
        let model = model("atoll-base", vendor);
        for (subleaf, kib) in sizes.into_iter().enumerate() {
            let r = ask(&model, leaf, subleaf as u32);
            let bytes = ((r.ebx >> 22) + 1) * ((r.ebx & 0xfff) + 1) * (r.ecx + 1);
            assert_eq!(bytes, kib * 1024);
        }
        assert_eq!(ask(&model, leaf, 4).eax & 0x1f, 0);
    }
}

#[test]
fn frequencies_are_truthful_or_absent() {
    let with = |khz| CpuModel::resolve("atoll-base", &host(Vendor::Intel), khz).unwrap();
    let r = ask(&with(2_595_000), 0x15, 0);
    assert_eq!(u64::from(r.ecx) * u64::from(r.ebx) / u64::from(r.eax), 2_595_000_000);
    assert_eq!(ask(&with(2_595_124), 0x15, 0), CpuidResult::default());
    let r = ask(&with(2_595_124), 0x4000_0010, 0);
    assert_eq!((r.eax, r.ebx), (2_595_124, 1_000_000));
}

#[test]
fn leaves_beyond_the_last_follow_the_vendor() {
    let (intel, amd) = (model("atoll-base", Vendor::Intel), model("atoll-base", Vendor::Amd));
    for leaf in [0x1000, 0x3fff_ffff, 0x4000_0011, 0x8000_1000, 0xffff_ffff] {
        assert_eq!(ask(&intel, leaf, 0), ask(&intel, 0x16, 0), "{leaf:#x}");
        assert_eq!(ask(&amd, leaf, 0), CpuidResult::default(), "{leaf:#x}");
    }
}

#[test]
fn any_leaf_with_any_state_is_answered() {
    let topologies = [ONE, Topology::flat(255), Topology { sockets: 0, cores: 0, threads: 0 }];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let model = model("atoll-2026", vendor);
        for base in [0, 0x4000_0000, 0x8000_0000, 0xffff_ff00u32] {
            for (leaf, topology) in (0..0x40).flat_map(|n| topologies.iter().map(move |t| (base + n, t))) {
                for subleaf in [0, 1, 2, 3, 4, 63, u32::MAX] {
                    let ctx = CpuidContext {
                        apic_id: u32::MAX,
                        topology,
                        os_xsave: true,
                        xcr0: u64::MAX,
                        apic_enabled: true,
                    };
                    model.cpuid(leaf, subleaf, &ctx);
                }
            }
        }
    }
}

#[test]
fn registers_are_sorted_unique_and_answer_writes_by_their_kind() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let model = model("atoll-base", vendor);
        assert!(model.msrs().windows(2).all(|w| w[0].index < w[1].index));
        let write = |index, value| {
            let entry = model.msr(index).unwrap();
            entry.write(entry.reset, value, model.linear_bits())
        };
        use crate::cpu::msr::index::*;
        assert_eq!(write(PAT, 0x0007_0406_0007_0401), Ok(0x0007_0406_0007_0401));
        assert_eq!(write(PAT, 0x0007_0406_0007_0402), Err(MsrFault));
        assert_eq!(write(MTRR_DEF_TYPE, 0xc06), Ok(0xc06));
        assert_eq!(write(MTRR_DEF_TYPE, 0xc07), Err(MsrFault));
        assert_eq!(write(MTRR_DEF_TYPE, 1 << 20), Err(MsrFault));
        assert_eq!(write(MTRR_PHYS_BASE_0, 0xff_ffff_f006), Ok(0xff_ffff_f006));
        assert_eq!(write(MTRR_PHYS_BASE_0 + 1, 1 << 40), Err(MsrFault));
        assert_eq!(write(MTRR_FIX_4K_C0000 + 7, 0x0606_0606_0606_0606), Ok(0x0606_0606_0606_0606));
        assert_eq!(write(MTRR_CAP, 0), Err(MsrFault));
        assert_eq!(write(LSTAR, 0xffff_8000_0000_0000), Ok(0xffff_8000_0000_0000));
        assert_eq!(write(LSTAR, 0x8000_0000_0000), Err(MsrFault));
        assert_eq!(write(SPEC_CTRL, 1), Ok(1));
        assert_eq!(write(SPEC_CTRL, 1 << 10), Err(MsrFault));
        assert_eq!(write(PRED_CMD, 1), Ok(0));
        assert!(!model.msr(PRED_CMD).unwrap().readable());
        assert_eq!(write(TSC_AUX, 1 << 32), Err(MsrFault));
        assert!(write(BIOS_SIGN_ID, 0).unwrap() != 0);
        assert_eq!(model.msr(ARCH_CAPABILITIES).is_some(), vendor == Vendor::Intel);
        assert_eq!(model.msr(AMD_HWCR).is_some(), vendor == Vendor::Amd);
        assert!(model.msr(0x3a).is_none() && model.msr(0x1234).is_none());
    }
}

#[test]
fn control_register_masks_follow_the_features() {
    let (base, newer) = (model("atoll-base", Vendor::Amd), model("atoll-2026", Vendor::Intel));
    assert_eq!(base.cr4_mask() & 1 << 17, 0);
    assert_ne!(newer.cr4_mask() & 1 << 17, 0);
    assert_eq!(base.cr4_mask() & (1 << 12 | 1 << 13 | 1 << 22 | 1 << 23), 0, "LA57, VMXE, PKE, CET");
    assert_eq!(base.efer_mask(), 0x20_0d01);
    assert_eq!(newer.efer_mask(), 0xd01);
}

#[test]
fn a_backend_that_promises_less_is_repeated_and_no_more() {
    let backend = BackendFeatures { assurances: Assurances::NONE, ..BackendFeatures::software() };
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let full = model("atoll-base", vendor);
        let bare = CpuModel::resolve_for("atoll-base", &host(vendor), &backend, 2_600_000).unwrap();
        let shown = |m: &CpuModel| {
            let leaf = |n| ask(m, n, 0);
            let (eight, last) = (leaf(0x8000_0008).ebx, leaf(0x8000_0021));
            let amd = if vendor == Vendor::Amd { (eight, last.eax, last.ecx) } else { (0, 0, 0) };
            (leaf(7).edx >> 26, amd, m.msr(msr::ARCH_CAPABILITIES).map_or(0, |e| e.reset))
        };
        assert_eq!(shown(&bare), (0, (0, 0, 0), 0), "{vendor:?}");
        assert_ne!(shown(&full), shown(&bare));
        let rule = |m: &CpuModel, index, value| m.msr(index).unwrap().write(0, value, 48).is_ok();
        assert!(rule(&full, msr::SPEC_CTRL, 7) && rule(&full, msr::PRED_CMD, 1));
        assert!(!rule(&bare, msr::SPEC_CTRL, 1) && !rule(&bare, msr::PRED_CMD, 1));
        assert!(bare.assurances_hold_on(&BackendFeatures::software()));
        assert!(!full.assurances_hold_on(&backend), "a machine from the software CPU was promised more");
        let again = CpuModel::with_identity("atoll-base", vendor, *full.features(), 2_600_000).unwrap();
        assert_eq!(again, full, "without further words a model promises everything");
        assert_eq!(again.with_assurances(bare.assurances()), bare);
    }
}
