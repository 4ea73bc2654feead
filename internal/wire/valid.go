package wire

import (
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Valid returns a copy of a message with all strings as valid UTF-8, and reports whether any string
// changed. Protobuf rejects a whole message for one invalid string. The message itself is not
// modified: its maps may belong to a record.
func Valid(m proto.Message) (valid proto.Message, changed bool) {
	valid = proto.Clone(m)
	changed = makeValid(valid.ProtoReflect())
	return valid, changed
}

func makeValid(m protoreflect.Message) (changed bool) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			changed = makeMapValid(f, v.Map()) || changed
		case f.IsList():
			list := v.List()
			for i := range list.Len() {
				fixed, bad := validValue(f, list.Get(i))
				if bad && f.Kind() == protoreflect.StringKind {
					list.Set(i, fixed)
				}
				changed = changed || bad
			}

		default:
			fixed, bad := validValue(f, v)
			if bad && f.Kind() == protoreflect.StringKind {
				m.Set(f, fixed)
			}
			changed = changed || bad
		}

		return true
	})

	return changed
}

func makeMapValid(f protoreflect.FieldDescriptor, entries protoreflect.Map) (changed bool) {
	type entry struct {
		key   protoreflect.MapKey
		value protoreflect.Value
	}

	var odd []entry
	entries.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		value, badValue := validValue(f.MapValue(), v)
		key, badKey := validValue(f.MapKey(), k.Value())
		if badKey || badValue {
			changed = true
			odd = append(odd, entry{k, v})
			odd = append(odd, entry{key.MapKey(), value})
		}

		return true
	})

	for i := 0; i < len(odd); i += 2 {
		entries.Clear(odd[i].key)
		entries.Set(odd[i+1].key, odd[i+1].value)
	}

	return changed
}

// validValue returns a value with valid strings. A message is modified in place.
func validValue(f protoreflect.FieldDescriptor, v protoreflect.Value) (protoreflect.Value, bool) {
	switch f.Kind() {
	case protoreflect.StringKind:
		if s := v.String(); !utf8.ValidString(s) {
			return protoreflect.ValueOfString(strings.ToValidUTF8(s, string(utf8.RuneError))), true
		}
	case protoreflect.MessageKind:
		return v, makeValid(v.Message())
	}

	return v, false
}
