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

// value decodes the value whose first token is tok. group is what the list or map around it may
// still keep, nil outside of any. Errors are of the input as a whole.
func (d *decoder) value(tok json.Token, v reflect.Value, path string, group *int) error {
	if tok == nil {
		return nil // null leaves everything as it is
	}

	if v.Kind() == reflect.Pointer {
		fresh := reflect.New(v.Type().Elem())
		lost := d.lost
		err := d.value(tok, fresh.Elem(), path, group)
		if d.fits(fresh.Elem(), lost) {
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
	case reflect.Interface: // nobody reads such a field
		return d.skip(tok)
	}

	return d.scalar(tok, v, path)
}

// fits says whether a value was decoded, at least in part, since so many fields had been lost.
func (d *decoder) fits(v reflect.Value, lost int) bool { return d.lost == lost || !v.IsZero() }

// group is the allowance of the list or map that begins.
func (d *decoder) group(outer *int) *int {
	if outer != nil {
		return outer
	}
	n := d.limits.Group
	return &n
}

// custom decodes a scalar into a type with a decoder of its own.
func (d *decoder) custom(tok json.Token, v reflect.Value, path string) error {
	if s, isText := tok.(string); isDelim(tok) || isText && len(s) > d.limits.Text {
		d.leave(path)
		return d.skip(tok)
	}

	encoded, err := json.Marshal(tok)
	if err != nil {
		return err
	}

	fresh := reflect.New(v.Type())
	if json.Unmarshal(encoded, fresh.Interface()) != nil {
		d.leave(path)
		return nil
	}

	v.Set(fresh.Elem())

	return nil
}

func isDelim(tok json.Token) bool {
	_, ok := tok.(json.Delim)
	return ok
}

// scalar decodes a text, a number or a boolean.
func (d *decoder) scalar(tok json.Token, v reflect.Value, path string) error {
	switch t := tok.(type) {
	case string:
		if v.Kind() == reflect.String && len(t) <= d.limits.Text {
			v.SetString(t)
			return d.keep(len(t))
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

	d.leave(path)

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

// object decodes the fields of a struct by their exact names.
func (d *decoder) object(tok json.Token, v reflect.Value, path string, group *int) error {
	if tok != json.Delim('{') {
		d.leave(path)
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

// entry is the next key of an object with the first token of its value.
func (d *decoder) entry() (key string, value json.Token, done bool, err error) {
	tok, err := d.token()
	if err != nil || tok == json.Delim('}') {
		return "", nil, true, err
	}
	key, _ = tok.(string)
	value, err = d.token()
	return key, value, false, err
}

// table decodes a map. An entry whose key or value does not fit is left out.
func (d *decoder) table(tok json.Token, v reflect.Value, path string, group *int) error {
	if tok != json.Delim('{') {
		d.leave(path)
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
		if !ok || !always && !afford(group, text, value) {
			d.leave(path + " (an entry)")
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
			err = d.keep(len(text))
		}

		if err != nil {
			return err
		}

		if d.fits(element, lost) {
			v.SetMapIndex(key, element)
		}
	}
}

// key makes a map's key of a text.
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

// afford takes an element from what a group may keep.
func afford(group *int, key string, value json.Token) bool {
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

// list decodes a slice. A single text stands for a list of one, as Docker's API has it for
// commands.
func (d *decoder) list(tok json.Token, v reflect.Value, path string, group *int) error {
	if s, ok := tok.(string); ok && v.Type().Elem().Kind() == reflect.String && len(s) <= d.limits.Text {
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		v.Index(0).SetString(s)
		return d.keep(len(s))
	}

	if tok != json.Delim('[') {
		d.leave(path)
		return d.skip(tok)
	}

	v.Set(reflect.MakeSlice(v.Type(), 0, 0))
	for {
		tok, err := d.token()
		if err != nil || tok == json.Delim(']') {
			return err
		}

		if !afford(group, "", tok) {
			d.leave(path + " (an element)")
			if err := d.skip(tok); err != nil {
				return err
			}
			continue
		}

		element, lost := reflect.New(v.Type().Elem()).Elem(), d.lost
		if err := d.value(tok, element, path, group); err != nil {
			return err
		}

		if d.fits(element, lost) {
			v.Set(reflect.Append(v, element))
		}
	}
}

// array decodes the first elements of a list.
func (d *decoder) array(tok json.Token, v reflect.Value, path string, group *int) error {
	if tok != json.Delim('[') {
		d.leave(path)
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

// fields are the indexes of each struct type's fields by their JSON names.
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

// fieldByIndex is a field, below embedded pointers too.
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
