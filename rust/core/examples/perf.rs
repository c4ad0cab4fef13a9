use heedful_core::tokenizer::*;
struct Instant(u64);
impl Instant {
    fn now() -> Self {
        Self(cpu())
    }
    fn elapsed(&self) -> std::time::Duration {
        std::time::Duration::from_nanos(cpu() - self.0)
    }
}
unsafe extern "C" {
    fn clock_gettime(c: i32, t: *mut [i64; 2]) -> i32;
}
fn cpu() -> u64 {
    let mut t = [0i64; 2];
    unsafe {
        clock_gettime(3, &mut t);
    }
    t[0] as u64 * 1_000_000_000 + t[1] as u64
}
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let json = std::fs::read_to_string(&args[1]).unwrap();
    let t = Instant::now();
    let tok = Tokenizer::from_json(&json).unwrap();
    println!("load {:?}", t.elapsed());
    let o = EncodeOptions { add_special_tokens: false, allowed_special: AllowedSpecial::None };
    for path in &args[2..] {
        let text = std::fs::read(path).unwrap();
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut docs: Vec<&str> = vec![];
        let mut at = 0;
        while at < text.len() {
            let mut e = (at + 1_000_000).min(text.len());
            while !text.is_char_boundary(e) {
                e += 1
            }
            docs.push(&text[at..e]);
            at = e;
        }
        docs.truncate(10);
        let mut out = Vec::new();
        let mut rates = vec![];
        for d in &docs {
            out.clear();
            let t = Instant::now();
            tok.encode_into(*d, o, &mut out).unwrap();
            rates.push(d.len() as f64 / t.elapsed().as_secs_f64() / 1e6);
        }
        let first = rates[0];
        rates.sort_by(f64::total_cmp);
        let mut again = vec![];
        for d in &docs {
            for _ in 0..3 {
                out.clear();
                let t = Instant::now();
                tok.encode_into(*d, o, &mut out).unwrap();
                again.push(d.len() as f64 / t.elapsed().as_secs_f64() / 1e6);
            }
        }
        again.sort_by(f64::total_cmp);
        println!(
            "{path}: first {first:.0} new {:.0} MB/s (min {:.0} max {:.0}); repeat {:.0}",
            rates[rates.len() / 2],
            rates[0],
            rates[rates.len() - 1],
            again[again.len() / 2]
        );
        if let Ok(n) = std::env::var("LOOP") {
            for _ in 0..n.parse::<usize>().unwrap() {
                for d in &docs {
                    out.clear();
                    tok.encode_into(*d, o, &mut out).unwrap();
                }
            }
        }
    }
}
