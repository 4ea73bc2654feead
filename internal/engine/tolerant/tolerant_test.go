package tolerant

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

var small = Limits{Text: 16, Group: 256, Total: 4096, Keep: func(k string) bool { return k == "own" }, KeptText: 64}

type inner struct {
	Number int8
	At     time.Time
	Addr   netip.Addr
}

type Embedded struct{ Shared string }

type record struct {
	Embedded

	Name   string `json:"name"`
	On     bool
	Float  float64
	List   []string
	Map    map[string]string
	Inner  *inner
	Items  []inner
	Addrs  map[netip.Addr]*inner
	Pair   [2]string
	Any    any
	hidden string
}

func TestDecodeKeepsWhatFits(t *testing.T) {
	for name, test := range map[string]struct {
		in      string
		ok      func(*record) bool
		skipped string // part of a path
	}{
		"plain": {`{"name":"a","On":true,"Float":1.5,"List":["x","y"],"Map":{"k":"v"}}`, func(r *record) bool {
			return r.Name == "a" && r.On && r.Float == 1.5 && len(r.List) == 2 && r.Map["k"] == "v"
		}, ""},
		"embedded": {`{"Shared":"s"}`, func(r *record) bool { return r.Shared == "s" }, ""},
		"unknown fields": {`{"x":{"y":[1,{"z":[]}]},"name":"a"}`, func(r *record) bool {
			return r.Name == "a"
		}, ""},
		"null": {`{"name":null,"Inner":null,"List":null,"On":true}`, func(r *record) bool {
			return r.Inner == nil && r.On
		}, ""},
		"wrong type": {`{"name":{"a":[1]},"On":true}`, func(r *record) bool {
			return r.Name == "" && r.On
		}, ".name"},
		"number for text": {`{"List":[1,"a",{},[],null]}`, func(r *record) bool {
			return slices.Contains(r.List, "a")
		}, ".List"},
		"text for list": {`{"List":"a b"}`, func(r *record) bool {
			return len(r.List) == 1 && r.List[0] == "a b"
		}, ""},
		"list for map": {`{"Map":["a"],"On":true}`, func(r *record) bool { return r.Map == nil && r.On }, ".Map"},
		"number overflows": {`{"Inner":{"Number":99999,"Addr":"::1"}}`, func(r *record) bool {
			return r.Inner.Number == 0 && r.Inner.Addr.Is6()
		}, ".Inner.Number"},
		"absurd number": {`{"Inner":{"Number":1e999},"Float":1e999,"On":true}`, func(r *record) bool {
			return r.On
		}, ".Float"},
		"bad time": {`{"Inner":{"At":"yesterday","Number":1}}`, func(r *record) bool {
			return r.Inner.Number == 1
		}, ".Inner.At"},
		"bad address": {`{"Inner":{"Addr":"99999/foo","Number":1}}`, func(r *record) bool {
			return r.Inner.Number == 1
		}, ".Inner.Addr"},
		"bad key": {`{"Addrs":{"x":{"Number":1},"::1":{"Number":2}}}`, func(r *record) bool {
			return len(r.Addrs) == 1
		}, ".Addrs"},
		"half of an element": {`{"Items":[{"Number":1,"Addr":"x"},{"Number":2}]}`, func(r *record) bool {
			return len(r.Items) == 2
		}, ".Items.Addr"},
		"array": {`{"Pair":["a","b","c"]}`, func(r *record) bool { return r.Pair == [2]string{"a", "b"} }, ""},
		"any":   {`{"Any":{"a":1},"On":true}`, func(r *record) bool { return r.Any == nil && r.On }, ""},
		"long text": {`{"name":"` + strings.Repeat("a", 40) + `","On":true}`, func(r *record) bool {
			return r.Name == "" && r.On
		}, ".name"},
		"very long text": {`{"name":"` + strings.Repeat("a", 4000) + `","On":true}`, func(r *record) bool {
			return r.Name == "" && r.On
		}, "1 strings longer than 64 bytes"},
		"long escapes": {`{"name":"` + strings.Repeat(`\"\u00ff\\`, 400) + `","On":true}`, func(r *record) bool {
			return r.Name == "" && r.On
		}, "1 strings"},
		"very long key": {`{"` + strings.Repeat("k", 4000) + `":1,"On":true}`, func(r *record) bool {
			return r.On
		}, "1 strings"},
		"our own entry": {`{"Map":{` + many(50) + `,"own":"` + strings.Repeat("o", 60) + `"}}`, func(r *record) bool {
			return len(r.Map["own"]) == 60 && len(r.Map) < 20
		}, ".Map"},
		"case":          {`{"NAME":"a"}`, func(r *record) bool { return r.Name == "" }, ""},
		"invalid UTF-8": {"{\"name\":\"a\xff\"}", func(r *record) bool { return r.Name == "a\uFFFD" }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var r record
			skipped, err := Decode(iotest.OneByteReader(strings.NewReader(test.in)), &r, small)
			if err != nil || !test.ok(&r) || r.hidden != "" {
				t.Errorf("decoded %+v, skipped %q: %v", r, skipped, err)
			}

			if (test.skipped == "") != (len(skipped) == 0) ||
				!strings.Contains(strings.Join(skipped, ","), test.skipped) {
				t.Errorf("skipped %q, want %q", skipped, test.skipped)
			}
		})
	}
}

func many(n int) string {
	var out []string
	for i := range n {
		out = append(out, fmt.Sprintf(`"k%d":"v"`, i))
	}
	return strings.Join(out, ",")
}

func TestDecodeBrokenInput(t *testing.T) {
	for _, in := range []string{``, `{`, `{"name":"a`, `{"name":`, `{"x":[[`, `{]`, `{"a" 1}`, `nul`,
		`{"name":"a\q"}`} {
		var r record
		if _, err := Decode(strings.NewReader(in), &r, small); err == nil {
			t.Errorf("Decode(%s) returned no error", in)
		}
	}

	var r record
	deep := `{"x":` + strings.Repeat("[", 5000)
	if _, err := Decode(strings.NewReader(deep), &r, small); !errors.Is(err, ErrTooLarge) {
		t.Errorf("deeply nested input: %v, want ErrTooLarge", err)
	}

	wide := `{"Items":[` + strings.TrimSuffix(strings.Repeat(`{"Number":1},`, 9999), ",") + `],"On":true}`
	if _, err := Decode(strings.NewReader(wide), &r, small); err != nil || len(r.Items) > 16 || !r.On {
		t.Errorf("long list: %d elements decoded, %v", len(r.Items), err)
	}
}

// TestEachSkipsBadElements checks that an unreadable element does not fail the others.
func TestEachSkipsBadElements(t *testing.T) {
	in := `[{"name":"a"},{"name":7},null,"x",[1,[2]],{"Map":"no","name":"b"}]`
	var names []string
	err := Each(strings.NewReader(in), small, func(r *record, _ []string) error {
		names = append(names, r.Name)
		return nil
	})
	if err != nil || !slices.Equal(names, []string{"a", "", "b"}) {
		t.Errorf("%q, %v", names, err)
	}

	if err := Each(strings.NewReader(`null`), small, func(*record, []string) error { return nil }); err != nil {
		t.Errorf("null: %v", err)
	}

	if err := Each(strings.NewReader(`[{"name":"a"},{"na`), small, func(*record, []string) error {
		return nil
	}); err == nil {
		t.Error("Each returned no error for a truncated list")
	}
}

// repeater reads a text over and over, n bytes in total.
type repeater struct {
	text   string
	offset int
	n      int
}

func (r *repeater) Read(p []byte) (int, error) {
	if r.n <= 0 {
		return 0, io.EOF
	}

	n := copy(p, r.text[r.offset:])
	r.offset, r.n = (r.offset+n)%len(r.text), r.n-n
	return n, nil
}

// TestMemoryIsBounded reads 16 MiB of each kind of value and allows 8 MiB of heap growth.
func TestMemoryIsBounded(t *testing.T) {
	for name, test := range map[string]struct{ begin, repeat string }{
		"text":     {`{"name":"`, "a"},
		"map":      {`{"Map":{`, `"key":"value",`},
		"unknown":  {`{"x":[`, `{"a":[1,2,3],"b":"c"},`},
		"elements": {`{"Items":[`, `{"Number":1},`},
	} {
		t.Run(name, func(t *testing.T) {
			runtime.GC()
			var before, now, most runtime.MemStats
			runtime.ReadMemStats(&before)
			in := io.MultiReader(strings.NewReader(test.begin),
				&repeater{text: strings.Repeat(test.repeat, 2000), n: 16 << 20})
			reads := 0
			measured := readerFunc(func(p []byte) (int, error) {
				if reads++; reads%256 == 0 {
					runtime.GC()
					runtime.ReadMemStats(&now)
					most.HeapAlloc = max(most.HeapAlloc, now.HeapAlloc)
				}
				return in.Read(p)
			})

			var r record
			if _, err := Decode(measured, &r, small); err == nil {
				t.Error("Decode returned no error for truncated input")
			}

			if grown := int64(most.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
				t.Errorf("the heap grew by %d MiB", grown>>20)
			}
		})
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
