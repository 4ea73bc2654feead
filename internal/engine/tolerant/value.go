package tolerant

import (
	"encoding"
	"encoding/json"
	"math"
	"reflect"
	"strconv"
	"strings"
	"sync"
)

var (
	jsonUnmarshaler = reflect.TypeFor[json.Unmarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// value decodes a value; tok is its first token. group is the remaining allowance of the enclosing
// list or map, or nil outside of any. An error means that the whole input cannot be read.
func (d *decoder) value(tok json.Token, v reflect.Value, path string, group *int) error {
	if tok == nil {
		return nil // null does not change the target
	}

	if v.Kind() == reflect.Pointer {
		fresh := reflect.New(v.Type().Elem())
		lost := d.lost
		err := d.value(tok, fresh.Elem(), path, group)
		if d.isDecoded(fresh.Elem(), lost) {
			v.Set(fresh)
		}
		return err
	}

	if p := reflect.PointerTo(v.Type()); p.Implements(jsonUnmarshaler) || p.Implements(textUnmarshaler) {
		return d.custom(tok, v, path)
	}

	switch v.Kind() {
	case reflect.Struct:
		return d.object(tok, v, path, group)
	case reflect.Map:
		return d.table(tok, v, path, d.group(group))
	case reflect.Slice:
		return d.list(tok, v, path, d.group(group))
	case reflect.Array:
		return d.array(tok, v, path, group)
	case reflect.Interface: // no caller reads such a field
		return d.skip(tok)
	}

	return d.scalar(tok, v, path)
}

// isDecoded reports whether v was decoded at least in part. lostBefore is the number of skipped
// fields before v.
func (d *decoder) isDecoded(v reflect.Value, lostBefore int) bool {
	return d.lost == lostBefore || !v.IsZero()
}

// group returns the allowance of a new list or map: the one of the outermost list or map around it.
func (d *decoder) group(outer *int) *int {
	if outer != nil {
		return outer
	}
	n := d.limits.Group
	return &n
}

// custom decodes a scalar into a type with its own UnmarshalJSON or UnmarshalText.
func (d *decoder) custom(tok json.Token, v reflect.Value, path string) error {
	if s, isText := tok.(string); isDelim(tok) || isText && len(s) > d.limits.Text {
		d.recordSkipped(path)
		return d.skip(tok)
	}

	encoded, err := json.Marshal(tok)
	if err != nil {
		return err
	}

	fresh := reflect.New(v.Type())
	if json.Unmarshal(encoded, fresh.Interface()) != nil {
		d.recordSkipped(path)
		return nil
	}

	v.Set(fresh.Elem())

	return nil
}

func isDelim(tok json.Token) bool {
	_, ok := tok.(json.Delim)
	return ok
}

// scalar decodes a string, a number or a boolean.
func (d *decoder) scalar(tok json.Token, v reflect.Value, path string) error {
	switch t := tok.(type) {
	case string:
		if v.Kind() == reflect.String && len(t) <= d.limits.Text {
			v.SetString(t)
			return d.addSize(len(t))
		}

	case bool:
		if v.Kind() == reflect.Bool {
			v.SetBool(t)
			return nil
		}

	case json.Number:
		if setNumber(v, t.String()) {
			return nil
		}
	}

	d.recordSkipped(path)

	return d.skip(tok)
}

func setNumber(v reflect.Value, text string) bool {
	switch {
	case v.CanInt():
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || v.OverflowInt(n) {
			return false
		}
		v.SetInt(n)

	case v.CanUint():
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil || v.OverflowUint(n) {
			return false
		}
		v.SetUint(n)

	case v.CanFloat():
		n, err := strconv.ParseFloat(text, 64)
		if err != nil || math.IsInf(n, 0) {
			return false
		}
		v.SetFloat(n)

	default:
		return false
	}

	return true
}

// object decodes an object into a struct. Field names must match exactly.
func (d *decoder) object(tok json.Token, v reflect.Value, path string, group *int) error {
	if tok != json.Delim('{') {
		d.recordSkipped(path)
		return d.skip(tok)
	}

	known := fieldsOf(v.Type())
	for {
		key, value, done, err := d.entry()
		if done || err != nil {
			return err
		}

		index, ok := known[key]
		if !ok {
			if err := d.skip(value); err != nil {
				return err
			}
			continue
		}

		if err := d.value(value, fieldByIndex(v, index), path+"."+key, group); err != nil {
			return err
		}
	}
}

// entry reads the next key of an object and the first token of its value. done reports the end of
// the object.
func (d *decoder) entry() (key string, value json.Token, done bool, err error) {
	tok, err := d.token()
	if err != nil || tok == json.Delim('}') {
		return "", nil, true, err
	}
	key, _ = tok.(string)
	value, err = d.token()
	return key, value, false, err
}

// table decodes an object into a map. It skips entries with an unsuitable key or value.
func (d *decoder) table(tok json.Token, v reflect.Value, path string, group *int) error {
	if tok != json.Delim('{') {
		d.recordSkipped(path)
		return d.skip(tok)
	}

	v.Set(reflect.MakeMap(v.Type()))
	for {
		text, value, done, err := d.entry()
		if done || err != nil {
			return err
		}

		always := d.limits.Keep != nil && d.limits.Keep(text)
		key, ok := d.key(v.Type().Key(), text)
		if !ok || !always && !reserve(group, text, value) {
			d.recordSkipped(path + " (an entry)")
			if err := d.skip(value); err != nil {
				return err
			}
			continue
		}

		limits := d.limits
		if always {
			d.limits.Text = limits.KeptText
		}

		element, lost := reflect.New(v.Type().Elem()).Elem(), d.lost
		err = d.value(value, element, path, group)
		d.limits = limits
		if err == nil {
			err = d.addSize(len(text))
		}

		if err != nil {
			return err
		}

		if d.isDecoded(element, lost) {
			v.SetMapIndex(key, element)
		}
	}
}

// key converts a string to a map key. It reports false for an invalid or overlong key.
func (d *decoder) key(t reflect.Type, text string) (reflect.Value, bool) {
	key := reflect.New(t)
	if u, ok := key.Interface().(encoding.TextUnmarshaler); ok {
		return key.Elem(), len(text) <= d.limits.Text && u.UnmarshalText([]byte(text)) == nil
	}
	if t.Kind() != reflect.String {
		return key.Elem(), false
	}

	key.Elem().SetString(text)

	return key.Elem(), len(text) <= d.limits.Text
}

// reserve subtracts the size of an element from the allowance of its group. It reports false if the
// allowance is exhausted.
func reserve(group *int, key string, value json.Token) bool {
	cost := overhead + len(key)
	if s, ok := value.(string); ok {
		cost += len(s)
	}
	if cost > *group {
		return false
	}

	*group -= cost

	return true
}

// list decodes a slice. It accepts a single string as a list of one element, as Docker's API does
// for commands.
func (d *decoder) list(tok json.Token, v reflect.Value, path string, group *int) error {
	if s, ok := tok.(string); ok && v.Type().Elem().Kind() == reflect.String && len(s) <= d.limits.Text {
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		v.Index(0).SetString(s)
		return d.addSize(len(s))
	}

	if tok != json.Delim('[') {
		d.recordSkipped(path)
		return d.skip(tok)
	}

	v.Set(reflect.MakeSlice(v.Type(), 0, 0))
	for {
		tok, err := d.token()
		if err != nil || tok == json.Delim(']') {
			return err
		}

		if !reserve(group, "", tok) {
			d.recordSkipped(path + " (an element)")
			if err := d.skip(tok); err != nil {
				return err
			}
			continue
		}

		element, lost := reflect.New(v.Type().Elem()).Elem(), d.lost
		if err := d.value(tok, element, path, group); err != nil {
			return err
		}

		if d.isDecoded(element, lost) {
			v.Set(reflect.Append(v, element))
		}
	}
}

// array decodes the first elements of a list and skips elements beyond the length of the array.
func (d *decoder) array(tok json.Token, v reflect.Value, path string, group *int) error {
	if tok != json.Delim('[') {
		d.recordSkipped(path)
		return d.skip(tok)
	}

	for i := 0; ; i++ {
		tok, err := d.token()
		if err != nil || tok == json.Delim(']') {
			return err
		}

		if i < v.Len() {
			err = d.value(tok, v.Index(i), path, group)
		} else {
			err = d.skip(tok)
		}

		if err != nil {
			return err
		}
	}
}

// fields caches the field indexes of each struct type by JSON name.
var fields sync.Map

func fieldsOf(t reflect.Type) map[string][]int {
	if known, ok := fields.Load(t); ok {
		return known.(map[string][]int) //nolint:forcetypeassert // only these are stored
	}

	names := map[string][]int{}
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || name == "-" || f.Anonymous && name == "" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		if other, ok := names[name]; !ok || len(f.Index) < len(other) {
			names[name] = f.Index
		}
	}

	fields.Store(t, names)

	return names
}

// fieldByIndex returns a field of v. It allocates embedded pointers on the way.
func fieldByIndex(v reflect.Value, index []int) reflect.Value {
	for i, x := range index {
		if i > 0 && v.Kind() == reflect.Pointer {
			if v.IsNil() {
				v.Set(reflect.New(v.Type().Elem()))
			}
			v = v.Elem()
		}
		v = v.Field(x)
	}

	return v
}
