//! The comparison of layouts with programs, against programs made up from the tables.

use std::collections::HashMap;
use std::ffi::CString;

use super::program::Program;
use super::tables::TABLES;
use super::*;

const CODE: usize = 0x10_0000;
const DATA: usize = 0x20_0000;
const DRIVERS: usize = 0x30_0000;
const LIST_HEAD: usize = 0x40_0000;

/// A program with the drivers of one series.
struct Fake {
    memory: HashMap<usize, u8>,
    symbols: HashMap<CString, usize>,
    drivers: HashMap<CString, usize>,
    driver_size: usize,
}

impl Fake {
    fn of(table: &Table) -> Fake {
        let layout = &table.layout;
        let mut fake = Fake {
            memory: HashMap::new(),
            symbols: HashMap::new(),
            drivers: HashMap::new(),
            driver_size: layout.drv_sizeof as usize,
        };
        let mut functions = (CODE..).step_by(16);
        for mark in table.marks.iter().filter(|mark| mark.exported) {
            fake.symbols.insert(mark.function.into(), functions.next().expect("endless"));
        }
        let mut previous = LIST_HEAD;
        for (index, reference) in table.references.iter().enumerate() {
            let driver = DRIVERS + index * 0x1000;
            let name = DATA + 0x1000 + index * 0x100;
            fake.write(driver, &vec![0; layout.drv_sizeof as usize]);
            fake.write(name, reference.format_name.to_bytes_with_nul());
            fake.write_word(driver + layout.drv_format_name as usize, name);
            fake.write(driver + layout.drv_instance_size as usize, &64i32.to_ne_bytes());
            for flag in reference.flags {
                fake.write(driver + flag.offset as usize, &[u8::from(flag.value)]);
            }
            for slot in reference.slots {
                let value = match slot.holds {
                    Holds::Code => functions.next().expect("endless"),
                    Holds::Data => DATA,
                    Holds::Function(name) => *fake
                        .symbols
                        .entry(name.into())
                        .or_insert_with(|| functions.next().expect("endless")),
                };
                fake.write_word(driver + slot.offset as usize, value);
            }
            fake.write_word(previous, driver);
            fake.write_word(driver + layout.drv_list as usize + WORD, previous);
            previous = driver + layout.drv_list as usize;
            if let Some(symbol) = reference.symbol {
                fake.symbols.insert(symbol.into(), driver);
            }
            fake.drivers.insert(reference.format_name.into(), driver);
        }
        fake.write(DATA, &[0; 8]);
        fake
    }

    fn write(&mut self, address: usize, bytes: &[u8]) {
        self.memory.extend(bytes.iter().enumerate().map(|(i, byte)| (address + i, *byte)));
    }

    fn write_word(&mut self, address: usize, word: usize) {
        self.write(address, &word.to_ne_bytes());
    }
}

impl Program for Fake {
    fn symbol(&self, name: &CStr) -> Option<usize> {
        self.symbols.get(name).copied()
    }

    fn symbol_size(&self, _address: usize) -> Option<usize> {
        Some(self.driver_size)
    }

    fn driver(&self, format_name: &CStr) -> Option<usize> {
        self.drivers.get(format_name).copied()
    }

    fn read(&self, address: usize, bytes: &mut [u8]) -> bool {
        bytes.iter_mut().enumerate().all(|(i, byte)| {
            address.checked_add(i).and_then(|at| self.memory.get(&at)).is_some_and(|there| {
                *byte = *there;
                true
            })
        })
    }

    fn is_code(&self, address: usize) -> bool {
        (CODE..DATA).contains(&address)
    }
}

const QCOW2: usize = DRIVERS;

fn refusal(table: &Table, program: &Fake) -> String {
    table.fits(program).expect_err("it must not fit")
}

fn newest() -> Table {
    *TABLES.last().expect("there are tables")
}

type Place = fn(&mut Layout) -> &mut u32;

/// Every field of the layout that places something in BlockDriver.
const PLACES: &[(&str, Place)] = &[
    ("drv_sizeof", |l| &mut l.drv_sizeof),
    ("drv_format_name", |l| &mut l.drv_format_name),
    ("drv_instance_size", |l| &mut l.drv_instance_size),
    ("drv_is_filter", |l| &mut l.drv_is_filter),
    ("drv_is_format", |l| &mut l.drv_is_format),
    ("drv_supports_backing", |l| &mut l.drv_supports_backing),
    ("drv_strong_runtime_opts", |l| &mut l.drv_strong_runtime_opts),
    ("drv_bdrv_open", |l| &mut l.drv_bdrv_open),
    ("drv_bdrv_close", |l| &mut l.drv_bdrv_close),
    ("drv_bdrv_reopen_prepare", |l| &mut l.drv_bdrv_reopen_prepare),
    ("drv_bdrv_refresh_limits", |l| &mut l.drv_bdrv_refresh_limits),
    ("drv_bdrv_child_perm", |l| &mut l.drv_bdrv_child_perm),
    ("drv_bdrv_co_preadv_part", |l| &mut l.drv_bdrv_co_preadv_part),
    ("drv_bdrv_co_block_status", |l| &mut l.drv_bdrv_co_block_status),
    ("drv_getlength", |l| &mut l.drv_getlength),
    ("drv_get_info", |l| &mut l.drv_get_info),
    ("drv_list", |l| &mut l.drv_list),
];

#[test]
fn each_series_is_told_from_the_others() {
    for table in &TABLES {
        let program = Fake::of(table);

        let layout = select_from(&TABLES, &program).expect("one fits");

        assert_eq!(series(&layout), series(&table.layout));
    }
}

#[test]
fn structures_alone_tell_the_series_apart() {
    let tables = TABLES.map(|table| Table { marks: &[], ..table });
    for table in &tables {
        let program = Fake::of(table);

        let layout = select_from(&tables, &program).expect("one fits");

        assert_eq!(series(&layout), series(&table.layout));
    }
}

#[test]
fn a_place_that_is_eight_bytes_off_is_refused() {
    for original in &TABLES {
        let program = Fake::of(original);
        for (name, field) in PLACES {
            for off in [8, 0u32.wrapping_sub(8)] {
                let mut table = *original;
                let place = field(&mut table.layout);
                *place = place.wrapping_add(off);

                assert!(table.fits(&program).is_err(), "{name} off by {off:#x}");
            }
        }
    }
}

#[test]
fn two_tables_that_fit_are_refused() {
    let table = newest();

    let reason = select_from(&[table, table], &Fake::of(&table)).expect_err("no guess");

    assert_eq!(reason, "it could be 10.0 or 10.0 as well");
}

#[test]
fn a_refusal_gives_the_reason_for_each_series() {
    let mut program = Fake::of(&newest());
    program.symbols.remove(c"bdrv_is_inactive");

    let reason = select_from(&TABLES, &program).expect_err("nothing fits");

    assert_eq!(
        reason,
        "not 7.2: it exports bdrv_co_getlength; not 10.0: it does not export bdrv_is_inactive"
    );
}

#[test]
fn a_function_of_a_later_series_is_refused() {
    let table = newest();
    let mut program = Fake::of(&table);
    program.symbols.insert(c"bdrv_co_is_all_zeroes".into(), CODE);

    assert_eq!(refusal(&table, &program), "it exports bdrv_co_is_all_zeroes");
}

#[test]
fn another_size_of_the_driver_is_refused() {
    let table = newest();
    let mut program = Fake::of(&table);
    program.driver_size -= 8;

    assert_eq!(
        refusal(&table, &program),
        "its BlockDriver has 840 bytes where that series has 848"
    );
}

#[test]
fn a_callback_where_the_series_has_none_is_refused() {
    let table = newest();
    let mut program = Fake::of(&table);
    program.write_word(QCOW2 + table.layout.drv_sizeof as usize - 32, CODE);

    assert!(refusal(&table, &program).starts_with("qcow2 has something at "));
}

#[test]
fn another_function_than_the_known_one_is_refused() {
    let table = newest();
    let mut program = Fake::of(&table);
    program.write_word(QCOW2 + table.layout.drv_bdrv_child_perm as usize, CODE + 1);

    assert!(
        refusal(&table, &program)
            .starts_with("qcow2's bdrv_child_perm is not bdrv_default_perms at ")
    );
}

#[test]
fn a_driver_outside_the_programs_memory_is_refused() {
    let table = newest();
    let mut program = Fake::of(&table);
    program.symbols.insert(c"bdrv_qcow2".into(), 0x50_0000);

    assert_eq!(refusal(&table, &program), "qcow2 does not lie in the program's memory");
}

#[test]
fn a_name_that_is_nowhere_is_refused() {
    let table = newest();
    let mut program = Fake::of(&table);
    program.write_word(QCOW2, usize::MAX);

    assert_eq!(refusal(&table, &program), "qcow2 does not have its name where expected");
}

#[test]
fn a_driver_that_is_not_registered_is_refused() {
    let table = newest();
    let mut program = Fake::of(&table);
    program.drivers.remove(c"copy-on-read");

    assert_eq!(refusal(&table, &program), "it has no driver copy-on-read");
}

#[test]
fn all_tables_agree_on_when_block_drivers_are_initialised() {
    for table in &TABLES {
        assert_eq!(table.layout.module_init_block as c_int, MODULE_INIT_BLOCK);
    }
}

#[test]
fn the_supported_series_are_named() {
    assert_eq!(supported(), "7.2, 10.0");
}
