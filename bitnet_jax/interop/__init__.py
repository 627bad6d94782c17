"""Foreign files to our trees and back."""
